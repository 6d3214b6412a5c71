"""One executable in many threads and processes; and the same bits wherever and whenever it runs."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler import api
from convloom.compiler.capture.capture import capture
from convloom.compiler.graph.ir import Graph
from convloom.compiler.run.executable import Executable
from convloom.errors import CaptureError
from convloom.kernels.devices import offline
from convloom.kernels.devices.interpreter import interpreting
from torch import nn

from . import nets
from .fake_cuda import FakeCuda, on_fake_cuda

THREADS, CALLS = 8, 3


def network() -> nets.Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = torch.relu(m.norm(m.conv(x)))
        return torch.relu(m.conv(y) + x), y.mean((2, 3))

    return nets.make(
        function, (2, 6, 5, 4), conv=nn.Conv2d(6, 6, 3, padding=1), norm=nn.BatchNorm2d(6)
    )


def compiled(target: str = "interpreter", **options: Any) -> Executable:
    module, inputs = network()
    return convloom.compile(module, inputs, target=target, tuning="heuristic", **options)


def digest(results: Any) -> str:
    """A hash of the bits of all results."""
    found = hashlib.sha256()
    for tensor in nets.tensors_of(results):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def images(number: int) -> torch.Tensor:
    (x,) = nets.inputs_of((1 + number % 3, 6, 5, 4), seed=number)
    return x


@pytest.mark.interpreter
@pytest.mark.parametrize("device", ["reference", "interpreter", "fake cuda"])
def test_eight_threads_get_what_one_gets(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different batches, so that buffers change between the calls."""
    exe = compiled("reference" if device == "reference" else "interpreter", dynamic_batch=(1, 3))
    cuda = FakeCuda()
    if device == "fake cuda":
        cuda.install(monkeypatch)
        on_fake_cuda(exe, cuda)
    alone = [digest(exe(images(number))) for number in range(THREADS)]
    ready = threading.Barrier(THREADS)

    def work(number: int) -> list[str]:
        ready.wait()
        return [digest(exe(images(number))) for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    assert found == [[expected] * CALLS for expected in alone]
    if device == "fake cuda":
        assert len(cuda.waits) == THREADS * (1 + CALLS) - 1, "a call did not wait for the last one"


@pytest.mark.interpreter
def test_threads_compile_side_by_side() -> None:
    def work(number: int) -> tuple[str, str]:
        exe = compiled(passes="none" if number % 2 else "default")
        return json.dumps(exe.plan.to_json()), digest(exe(images(1)))

    alone = [work(number) for number in range(2)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == alone * 2


@pytest.mark.interpreter
def test_compiling_waits_while_kernels_are_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter patches Triton's language for the whole process."""
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    exe = convloom.compile(nn.ReLU(), (torch.zeros(2, 3),), target="cuda:sm_90")
    request = exe.kernels[0].request
    assert request is not None
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        inside.wait()
        offline.compile_request(request)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with interpreting():
        inside.set()
        assert not done.wait(0.3)
    thread.join(60)
    assert done.is_set()


def _child(pipe: Any, exe: Executable | None) -> None:
    torch.set_num_threads(1)
    own = exe or compiled(dynamic_batch=(1, 3))
    pipe.send((json.dumps(own.plan.to_json()), digest(own(images(1)))))


@pytest.mark.interpreter
def test_a_forked_child_goes_on_with_its_parents_executable() -> None:
    exe = compiled(dynamic_batch=(1, 3))
    expected = json.dumps(exe.plan.to_json()), digest(exe(images(1)))
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, exe))
    process.start()
    assert mine.poll(120), "the child hangs"
    assert mine.recv() == expected
    process.join()


@pytest.mark.interpreter
def test_a_fresh_process_makes_the_same_plan_and_the_same_bits() -> None:
    exe = compiled(dynamic_batch=(1, 3))
    code = "from tests.test_threads import _child, Print; _child(Print(), None)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = [json.dumps(exe.plan.to_json()), digest(exe(images(1)))]
    assert json.loads(done.stdout) == expected


class Print:
    """A pipe to whoever reads stdout."""

    def send(self, value: Any) -> None:
        print(json.dumps(value))


@pytest.mark.interpreter
def test_repeats_and_saved_files_have_the_same_bits(tmp_path: Path) -> None:
    exe = compiled(dynamic_batch=(1, 3))
    expected = digest(exe(images(2)))
    assert [digest(exe(images(number))) for number in (2, 0, 2)][::2] == [expected] * 2
    exe.save(tmp_path / "net.loom")
    for _ in range(2):
        assert digest(convloom.load(tmp_path / "net.loom")(images(2))) == expected
    again = compiled(dynamic_batch=(1, 3))
    assert again.plan.to_json() == exe.plan.to_json()
    assert digest(again(images(2))) == expected


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_afterwards_if_it_was(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not during the capture, and whether it succeeds or not."""
    during = []

    def captured(module: nn.Module, *rest: Any, **more: Any) -> Graph:
        during.append(gc.isenabled())
        return capture(module, *rest, **more)

    monkeypatch.setattr(api, "capture", captured)
    (gc.enable if enabled else gc.disable)()
    try:
        convloom.compile(nn.ReLU(), (torch.zeros(1, 2),), target="reference")
        assert gc.isenabled() is enabled
        with pytest.raises(CaptureError):
            convloom.compile(nn.ReLU(), (torch.zeros(1, 2), torch.zeros(1)), target="reference")
        assert gc.isenabled() is enabled and during == [False, False]
    finally:
        gc.enable()
