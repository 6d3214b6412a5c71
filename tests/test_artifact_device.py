"""Loaded machine code: the launches are those of the compiled program, through a driver that is
none; on the CPU each launch is interpreted with the very addresses it was given."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.artifact import device as gpu
from convloom.compiler.artifact import load as loading
from convloom.compiler.artifact.program import Program
from convloom.compiler.artifact.read import Artifact, open_artifact
from convloom.compiler.graph.memory import Memory
from convloom.compiler.plan import streams
from convloom.compiler.run import cuda_graphs, runtime
from convloom.compiler.run.executable import Executable
from convloom.errors import KernelError, TargetUnavailableError
from convloom.kernels.contract import targets
from convloom.kernels.devices import execute, interpreter
from torch import nn

from .fake_driver import FakeDriver, Started
from .nets import make

BATCHES = (1, 3, 4)
CPU = torch.device("cpu")


def network() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Convolutions, a residual, a concatenation in place, a pooling, and a long linear layer whose
    sums are split among programs."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(m.first(x))
        y = torch.relu(m.second(y) + y)
        y = torch.cat([m.left(y), torch.relu(m.right(y))], 1)
        return m.head(torch.max_pool2d(y, 2).flatten(1))

    return make(
        forward,
        (4, 3, 16, 16),
        first=nn.Conv2d(3, 8, 3, padding=1),
        second=nn.Conv2d(8, 8, 3, padding=1),
        left=nn.Conv2d(8, 8, 1),
        right=nn.Conv2d(8, 8, 3, padding=1),
        head=nn.Linear(16 * 64, 10),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Executable]]:
    module, inputs = network()
    made = [
        convloom.compile(module, inputs, target=target, dynamic_batch=batches, tuning="heuristic")
        for target in ("cuda:sm_80", "cuda:sm_90")
        for batches in ((1, 1), (3, 4))
    ]
    path = tmp_path_factory.mktemp("files") / "net.loom"
    made[0].save(path, *made[1:])
    return path, made


@pytest.fixture(scope="module")
def artifact(saved: tuple[Path, list[Executable]]) -> Artifact:
    return open_artifact(saved[0])


def fake(artifact: Artifact, programs: tuple[Program, ...], **options: Any) -> FakeDriver:
    signatures = {}
    for program in programs:
        for image in program.images:
            signatures[artifact.code(image.cubin), image.entry] = image.signature
            if image.ptx is not None:
                code = artifact.code(image.ptx) + b"\0"
                signatures[code, image.entry] = image.signature
    return FakeDriver(signatures, **options)


def for_batch(programs: tuple[Program, ...], batch: int) -> Program:
    return next(each for each in programs if each.batches[0] <= batch <= each.batches[1])


def compiled_for(made: list[Executable], target: str, batch: int) -> Executable:
    found = [exe for exe in made if exe.target.name == target]
    return next(exe for exe in found if exe.plan.batch[0] <= batch <= exe.plan.batch[1])


class Recorder:
    """A compiled kernel of this process that says how it was launched."""

    def __init__(self, launches: list[tuple[Any, ...]], name: str) -> None:
        self.launches, self.name = launches, name

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launches.append((self.name, grid, arguments))


def in_process(exe: Executable, batch: int) -> list[tuple[Any, ...]]:
    """(kernel, programs, buffers and rows) of every launch that this process would make."""
    memory = Memory(exe.plan, runtime.constants_on(exe.plan, CPU), batch)
    names = {memory.flat(name).data_ptr(): name for name in exe.plan.buffers}
    launches: list[tuple[Any, ...]] = []
    recorders = [
        Recorder(launches, launch.kernel.fn.__name__) for _, launch in exe.plan.kernels
    ]
    for _, action in runtime.bind_plan(exe.plan, recorders, memory):
        action()
    found = []
    for (name, grid, arguments), (_, launch) in zip(launches, exe.plan.kernels, strict=True):
        by_name = dict(zip(launch.kernel.arg_names, arguments, strict=True))
        passed: list[Any] = []
        for parameter in launch.kernel.arg_names:
            if parameter in launch.constexprs:
                continue
            value = by_name[parameter]
            passed += value if isinstance(value, tuple) else [value]
        shown = [names[v.data_ptr()] if isinstance(v, torch.Tensor) else v for v in passed]
        found.append((name, grid[0], tuple(shown)))
    return found


def from_file(artifact: Artifact, program: Program, batch: int) -> list[tuple[Any, ...]]:
    """The same of a loaded program, as the driver sees it."""
    driver = fake(artifact, (program,))
    memory = Memory(program, gpu.upload(program, artifact.tensors, CPU), batch)
    names = {memory.flat(name).data_ptr(): name for name in program.buffers}
    kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx=False)
    for _, action in gpu.bind(driver, program, kernels, memory, lambda: 7):
        action()
    assert all(started.scratch == (0, 0) and started.stream == 7 for started in driver.started)
    return [
        (s.entry, s.programs, tuple(names.get(value, value) for value in s.arguments))
        for s in driver.started
    ]


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_loaded_program_launches_what_this_process_would(
    saved: tuple[Path, list[Executable]], artifact: Artifact, target: str, batch: int
) -> None:
    exe = compiled_for(saved[1], target, batch)
    programs = tuple(each for each in artifact.programs if each.target == target)
    launches = from_file(artifact, for_batch(programs, batch), batch)
    # Buffers of equal addresses (one that ends where nothing starts) would hide a difference.
    assert launches == in_process(exe, batch)
    assert len(launches) == len(exe.plan.kernels) > 3


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", BATCHES)
def test_what_the_driver_is_given_computes_the_network(
    saved: tuple[Path, list[Executable]], artifact: Artifact, batch: int
) -> None:
    module, (x,) = network()
    x = x[:batch]
    exe = compiled_for(saved[1], "cuda:sm_90", batch)
    program = for_batch(gpu.pick(artifact, 90)[0], batch)
    memory = Memory(program, gpu.upload(program, artifact.tensors, CPU), batch)
    waiting = iter(exe.plan.kernels)
    by_address = {memory.flat(name).data_ptr(): memory.flat(name) for name in program.buffers}

    def interpret(started: Started) -> None:
        _, launch = next(waiting)
        assert started.threads == 32 * launch.num_warps
        refs = execute.parameters(launch)
        given = dict(zip(refs, started.arguments, strict=True))
        with interpreter.interpreting():
            execute.interpret(launch, lambda ref: by_address[given[ref]], batch)

    driver = fake(artifact, (program,), observe=interpret)
    kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx=False)
    memory.view(program.inputs[0].place).copy_(x)
    for _, action in gpu.bind(driver, program, kernels, memory, lambda: 0):
        action()
    y = memory.view(program.outputs[0].place)
    torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-4)


def test_shared_memory_beyond_48_kb_is_asked_for(artifact: Artifact) -> None:
    program = artifact.programs[0]
    images = tuple(
        replace(image, shared_bytes=size, num_ctas=ctas, programmatic=True, cooperative=True)
        for image, size, ctas in zip(program.images, (49_152, 49_153), (1, 16), strict=False)
    )
    program = replace(program, images=images, calls=())
    driver = fake(artifact, (program,))
    kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx=False)
    first, second = (image.entry for image in images)
    size = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    cluster = "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED"
    assert driver.asked == [
        (second, "CU_FUNC_CACHE_PREFER_SHARED"),
        (second, size, 49_153),
        (second, cluster, 1),
    ]
    attributes = [
        [(each.id, each.value) for each in gpu._attributes(driver, image)] for image in images
    ]
    names = [[name for name, _ in each] for each in attributes]
    plain = [
        "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
        "CU_LAUNCH_ATTRIBUTE_COOPERATIVE",
    ]
    assert names[0] == plain
    assert names[1] == [
        *plain,
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION",
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE",
    ]
    assert vars(attributes[1][2][1].clusterDim) == {"x": 16, "y": 1, "z": 1}
    assert first != "" and [name for _, name in kernels] == [first, second]


def test_a_gpu_with_too_little_shared_memory_is_refused(artifact: Artifact) -> None:
    program = artifact.programs[0]
    driver = fake(artifact, (program,), shared_bytes=1)
    with pytest.raises(TargetUnavailableError, match=r"bytes of shared memory, this GPU has 1;"):
        gpu.load_kernels(driver, program, artifact.code, by_ptx=False)


def test_what_the_driver_refuses_is_named(artifact: Artifact) -> None:
    program = artifact.programs[0]
    driver = fake(artifact, (program,), fail_at="cuModuleLoadData")
    with pytest.raises(KernelError, match="cuModuleLoadData failed with CUDA_ERROR_INVALID_IMAGE"):
        gpu.load_kernels(driver, program, artifact.code, by_ptx=False)


def test_a_pointer_that_is_not_aligned_is_refused(artifact: Artifact) -> None:
    program = for_batch(gpu.pick(artifact, 90)[0], 1)
    driver = fake(artifact, (program,))
    kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx=False)
    constants = gpu.upload(program, artifact.tensors, CPU)
    name = next(iter(constants))
    moved = torch.empty(constants[name].numel() + 1, dtype=constants[name].dtype)[1:]
    memory = Memory(program, {**constants, name: moved}, 1)
    with pytest.raises(KernelError, match=f"buffer {name} is not aligned to 16 bytes"):
        gpu.bind(driver, program, kernels, memory, lambda: 0)


@pytest.mark.parametrize(
    ("capability", "target", "by_ptx"),
    [
        (80, "cuda:sm_80", False),
        (86, "cuda:sm_80", False),
        (89, "cuda:sm_80", False),
        (90, "cuda:sm_90", False),
        (100, "cuda:sm_80", True),
        (103, "cuda:sm_80", True),
    ],
)
def test_the_code_for_a_gpu(artifact: Artifact, capability: int, target: str, by_ptx: bool) -> None:
    programs, found = gpu.pick(artifact, capability)
    assert {each.target for each in programs} == {target} and found is by_ptx
    assert [each.batches for each in programs] == [(1, 1), (3, 4)]


def test_a_gpu_without_code_is_refused(artifact: Artifact) -> None:
    with pytest.raises(TargetUnavailableError) as caught:
        gpu.pick(artifact, 75)
    message = str(caught.value)
    assert "has no kernels for this GPU, sm_75; it holds cuda:sm_80 (batch 1 to 1)" in message
    assert "recompile=True" in message


def test_ptx_is_loaded_as_text_where_there_is_nothing_better(artifact: Artifact) -> None:
    programs, by_ptx = gpu.pick(artifact, 120)
    driver = fake(artifact, programs)
    gpu.load_kernels(driver, programs[0], artifact.code, by_ptx)
    assert by_ptx and all(code.endswith(b"\0") and b".version" in code for code in driver.loaded)


def test_only_the_oldest_generation_keeps_ptx(artifact: Artifact) -> None:
    names = list(artifact.archive.members)
    assert any(name.endswith(".ptx") for name in names if "sm_80" in name)
    assert not any(name.endswith(".ptx") for name in names if "sm_90" in name)


class CpuRunner(cuda_graphs.GraphRunner):
    """Launches without a CUDA graph, in the memory of this machine."""

    def run(self, inputs: Any, batch: int) -> list[torch.Tensor]:
        memory = Memory(self._plan, self._constants, batch)
        for _, action in self._bind(memory):
            action()
        return [memory.view(port.place).clone() for port in self._plan.outputs]


@pytest.mark.parametrize("capability", [80, 120])
def test_a_call_goes_to_the_program_of_its_batch(
    saved: tuple[Path, list[Executable]],
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
) -> None:
    driver = fake(artifact, artifact.programs)
    used: list[tuple[int, int]] = []

    def runner(artifact: Artifact, program: Program, by_ptx: bool) -> CpuRunner:
        kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx)

        def bind(memory: Memory) -> list[streams.Action]:
            used.append(program.batches)
            return gpu.bind(driver, program, kernels, memory, lambda: 0)

        return CpuRunner(program, gpu.upload(program, artifact.tensors, CPU), bind)

    monkeypatch.setattr(gpu, "runner", runner)
    monkeypatch.setattr(targets, "local_capability", lambda: capability)
    monkeypatch.setattr(loading.LoadedExecutable, "place", CPU)
    exe = convloom.load(saved[0])
    assert exe.device == "cuda" and exe.target.name == "cuda:sm_80" and not exe.executables
    _, (x,) = network()
    for batch in (4, 1, 3):
        assert exe(x[:batch]).shape == (batch, 10)
    assert used == [(3, 4), (1, 1), (3, 4)]
    with pytest.raises(convloom.InvalidInputError, match=r"\(1 to 1, 3 to 4\), got 2"):
        exe(x[:2])


def test_a_graph_is_compiled_here_only_where_that_is_allowed(
    tmp_path: Path, saved: tuple[Path, list[Executable]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.loom"
    exe = compiled_for(saved[1], "cuda:sm_90", 4)
    exe.save(path)
    monkeypatch.setattr(targets, "local_capability", lambda: 86)
    with pytest.raises(TargetUnavailableError, match="Save it for cuda:sm_86 too"):
        convloom.load(path)
    ran: list[str] = []

    def runner_for(graph: Any, plan: Any, target: Any, name: str) -> runtime.Runner:
        ran.append(name)
        return runtime.InterpreterRunner(plan)

    monkeypatch.setattr(runtime, "runner_for", runner_for)
    loaded = convloom.load(path, recompile=True)
    assert ran == ["cuda"] and loaded.target.name == "cuda:sm_86"
    assert [each.plan.target.name for each in loaded.executables] == ["cuda:sm_86"]
    assert pickle.loads(pickle.dumps(loaded)).target.name == "cuda:sm_86"


def test_no_gpu_is_said(saved: tuple[Path, list[Executable]]) -> None:
    if targets.local_capability() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(TargetUnavailableError, match='Load it with device="interpreter"'):
        convloom.load(saved[0])


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(TargetUnavailableError, match="pip install cuda-bindings"):
        gpu.cuda_driver()


def test_the_driver_has_every_name_that_is_used() -> None:
    """Against the real bindings, where they are installed; no GPU is needed to import them."""
    driver = pytest.importorskip("cuda.bindings.driver")
    image = open_image(num_ctas=2)
    attributes = gpu._attributes(driver, image)
    config = driver.CUlaunchConfig()
    config.attrs, config.numAttrs, config.hStream = attributes, 4, driver.CUstream(0)
    assert len(config.attrs) == 4
    for name in vars(FakeDriver):
        if name.startswith("cu"):
            assert hasattr(driver, name)


def open_image(**changes: Any) -> Any:
    from convloom.compiler.artifact.program import Image

    image = Image("kernel", "k.cubin", None, (), 4, 1, 0, cooperative=True, programmatic=True)
    return replace(image, **changes)


WITHOUT_TRITON = """
import sys
import torch
before = set(sys.modules)
import convloom
from convloom.compiler.artifact import device as gpu

class Runner(gpu.GraphRunner):
    pass

gpu.capability_here = lambda artifact: 90
gpu.runner = lambda artifact, program, by_ptx: Runner(
    program, gpu.upload(program, artifact.tensors, torch.device("cpu")), lambda memory: []
)
exe = convloom.load(sys.argv[1])
assert len(exe.programs) == 2 and exe.plan.to_text() and exe.summary["kernels"]
added = {name.partition(".")[0] for name in set(sys.modules) - before}
forbidden = {name for name in set(sys.modules) - before if name.startswith("torch.export")}
print(sorted(added & {"triton", "networkx", "safetensors", "rich"}), sorted(forbidden))
"""


def test_loading_machine_code_imports_neither_triton_nor_export(
    saved: tuple[Path, list[Executable]],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, str(saved[0])],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []"
