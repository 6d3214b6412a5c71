"""What happens at the limits: tensors beyond 32 bits, a full GPU, a failed one, Ctrl-C."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
import triton
from convloom.compiler.api import lowered
from convloom.compiler.graph.memory import Memory
from convloom.compiler.plan.arena import Lifetime, allocate
from convloom.compiler.run import cuda_graphs
from convloom.compiler.run.executable import Executable
from convloom.errors import KernelError
from convloom.kernels.contract import targets
from convloom.kernels.devices import offline
from torch import nn

from . import harness
from .fake_cuda import FakeCuda, on_fake_cuda

SM_90 = "cuda:sm_90"


def plan_of(module: nn.Module, *shape: int) -> Any:
    """The plan for an input that takes no memory here: every element is the same one."""
    return lowered(module.eval(), (torch.zeros(1).expand(shape),), target=SM_90)[1]


# Beyond 32 bits.


def test_offsets_beyond_2_to_the_31_are_64_bits_wide() -> None:
    plan = plan_of(nn.ReLU(), 2**16, 64, 32, 32)
    assert all(harness.is_wide(launch) for _, launch in plan.kernels)
    assert plan.buffers["output0"].size_bytes == 4 * 2**32
    below = plan_of(nn.ReLU(), 2**15 - 1, 64, 32, 32)
    assert not any(harness.is_wide(launch) for _, launch in below.kernels)


def test_the_arena_is_planned_beyond_2_to_the_31() -> None:
    large = 3 * 2**33
    lifetimes = {"a": Lifetime(large, 0, 1), "b": Lifetime(large, 1, 2), "c": Lifetime(512, 2, 3)}
    offsets, size = allocate(lifetimes)
    assert size == 2 * large and sorted(offsets.values()) == [0, 0, large]
    plan = plan_of(nn.Conv2d(8, 8, 3, padding=1), 2**13, 8, 256, 256)
    assert max(buffer.offset for buffer in plan.buffers.values()) >= 2**34


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Softmax(1), (2**31 + 8, 2), r"softmax of .* has 2,147,483,656 rows .*more than 2"),
        (nn.ReLU(), (2**40, 2**20), r"relu of .* has [\d,]+ programs, more than 2,147,483,647; m"),
        (nn.MaxPool2d(1), (2**17, 1, 256, 256), "8,589,934,592 rows"),
    ],
)
def test_what_cannot_be_indexed_is_refused(
    module: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        plan_of(module, *shape)


# A full GPU, a failed one.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().softmax(1)


X = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 4, 4)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.fixture
def exe(cuda: FakeCuda) -> Executable:
    made = convloom.compile(Net().eval(), (X,), target="interpreter", dynamic_batch=(1, 3))
    return on_fake_cuda(made, cuda)


@pytest.mark.interpreter
def test_out_of_memory_gives_back_what_was_taken(
    exe: Executable, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exe(X)
    taken: list[Any] = []
    real = cuda.bind

    def full(plan: Any, memory: Memory) -> Any:
        taken.append(weakref.ref(memory))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    exe._runner._bind = lambda memory: full(exe.plan, memory)  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match=r"batch 1 needs more GPU memory .*2\.00 GiB; 1 other"):
        exe(X[:1])
    gc.collect()
    assert taken[0]() is None and cuda.emptied == 1
    exe._runner._bind = lambda memory: real(exe.plan, memory)  # type: ignore[attr-defined]
    assert torch.equal(exe(X[:1]), expected[:1]), "the next call works"
    assert torch.equal(exe(X), expected)


@pytest.mark.interpreter
def test_out_of_memory_for_the_results(
    exe: Executable, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exe(X)

    def full(self: Any, inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs._CapturedPlan, "replay", full)
        with pytest.raises(KernelError, match="or with a smaller batch"):
            exe(X)
    assert torch.equal(exe(X), expected)


@pytest.mark.interpreter
def test_the_graph_that_was_not_used_for_longest_goes_first(
    exe: Executable, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "GRAPHS_KEPT", 2)
    runner: Any = exe._runner
    captured: list[int] = []
    real = runner._bind

    def bind(memory: Memory) -> Any:
        captured.append(memory.batch)
        return real(memory)

    runner._bind = bind
    images = {batch: X[:1].expand(batch, -1, -1, -1) for batch in (1, 2, 3)}
    for batch in (1, 2, 1, 3, 1, 2):
        assert exe(images[batch]).shape[0] == batch
    assert captured == [1, 2, 3, 2]


FAULTS: tuple[Callable[[], Exception], ...] = (
    lambda: RuntimeError("CUDA error: an illegal memory access was encountered\nhints ..."),
    lambda: RuntimeError("Triton Error [CUDA]: misaligned address"),
    lambda: KernelError("CUDA driver: cuLaunchKernelEx failed with CUDA_ERROR_ILLEGAL_ADDRESS"),
)


@pytest.mark.interpreter
@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_fault_kills_the_executable_and_names_the_kernel(
    exe: Executable, cuda: FakeCuda, fault: Callable[[], Exception]
) -> None:
    runner: Any = exe._runner
    real = runner._bind
    last = exe.plan.steps[-1].name

    def bind(memory: Memory) -> Any:
        def fail() -> None:
            raise fault()

        return [*real(memory)[:-1], (last, fail)]

    runner._bind = bind
    message = rf"GPU failed in {last}, batch 2, inputs .*\[N, 3, 4, 4\].* restart the process"
    with pytest.raises(KernelError, match=message) as told:
        exe(X)
    assert "hints" not in str(told.value)
    runner._bind = real
    with pytest.raises(KernelError, match="This executable is dead"):
        exe(X[:1])
    with pytest.raises(KernelError, match="This executable is dead"):
        runner.time_steps([X], 2)


@pytest.mark.interpreter
def test_a_fault_that_shows_while_waiting_is_named_too(exe: Executable, cuda: FakeCuda) -> None:
    cuda.synchronize_error = RuntimeError("CUDA error: unspecified launch failure")
    first = exe.plan.steps[0].name
    with pytest.raises(KernelError, match=rf"failed in {first}.*unspecified launch failure"):
        exe(X)


@pytest.mark.interpreter
def test_a_fault_inside_a_graph(
    exe: Executable, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay(self: Any, inputs: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(cuda_graphs._CapturedPlan, "replay", replay)
    with pytest.raises(KernelError, match="failed in one of its kernels, batch 2"):
        exe(X)


@pytest.mark.interpreter
def test_other_errors_do_not_kill(exe: Executable, cuda: FakeCuda) -> None:
    cuda.synchronize_error = RuntimeError("CUDA error: invalid configuration argument")
    with pytest.raises(RuntimeError, match="invalid configuration"):
        exe(X)
    cuda.synchronize_error = None
    assert exe(X).shape == (2, 4, 4, 4)


# Ctrl-C; in tuning: test_tune.py.


def test_an_interrupted_compilation_leaves_the_cache_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    before = triton.knobs.cache.dir
    # What was read before in this process would not be read again.
    offline.resources.cache_clear()
    plan = plan_of(nn.ReLU(), 2, 3)
    (request,) = [
        offline.request(launch, lambda ref: torch.float32, targets.parse(SM_90))
        for _, launch in plan.kernels
    ]

    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("_source", "check_tensor_memory", "_resources"):
        with monkeypatch.context() as patch:
            patch.setattr(offline, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                offline.resources(request)
        assert triton.knobs.cache.dir == before
        assert offline.known_resources(request) is None
        assert not list(tmp_path.rglob("*.tmp*"))
    resources = offline.resources(request)
    assert offline.known_resources(request) == resources
