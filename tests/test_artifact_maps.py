"""Kernels that read boxes, in a file: their tensor maps are those that this process would make, and
a map that reaches outside of its buffer is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.artifact import device as gpu
from convloom.compiler.artifact import rederive
from convloom.compiler.artifact.check import check_document
from convloom.compiler.artifact.maps import Map
from convloom.compiler.artifact.program import Program
from convloom.compiler.artifact.read import Artifact, open_artifact
from convloom.compiler.graph.memory import Buffer, Memory
from convloom.compiler.run import runtime
from convloom.compiler.run.executable import Executable
from convloom.errors import ArtifactError
from convloom.kernels.devices import execute
from convloom.kernels.hopper import core, gluon
from torch import nn

from .artifact_files import save_by_core
from .fake_driver import FakeDriver
from .nets import make

pytestmark = pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))

CPU = torch.device("cpu")
HALF = torch.float16


def network() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Filters with stride 1 and 2, and a product."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(m.second(torch.relu(m.first(x))))
        return m.head(y.mean((2, 3)))

    return make(
        forward,
        (4, 32, 8, 8),
        first=nn.Conv2d(32, 64, 3, padding=1),
        second=nn.Conv2d(64, 64, 3, padding=1, stride=2),
        head=nn.Linear(64, 40),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Executable]:
    """All of the network by the core, whatever the model says of such small layers, and a halo of
    several images, whose map has the batch as its second dimension."""
    return save_by_core(
        tmp_path_factory.mktemp("files"),
        network(),
        lambda tiles, plain: max(tiles, key=lambda tile: tile[core.BLOCK], default=plain),
        passes="none",
    )


@pytest.fixture(scope="module")
def artifact(saved: tuple[Path, Executable]) -> Artifact:
    return open_artifact(saved[0])


def launched(artifact: Artifact, batch: int, **options: Any) -> tuple[FakeDriver, Memory]:
    """What a loaded program tells the driver."""
    (program,) = artifact.programs
    signatures = {
        (artifact.code(image.cubin), image.entry): image.signature for image in program.images
    }
    driver = FakeDriver(signatures, **options)
    memory = Memory(program, gpu.upload(program, artifact.tensors, CPU), batch)
    kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx=False)
    for _, action in gpu.bind(driver, program, kernels, memory, lambda: 0):
        action()
    return driver, memory


@pytest.mark.parametrize("batch", [1, 4])
def test_maps_are_those_that_this_process_makes(
    saved: tuple[Path, Executable], artifact: Artifact, batch: int
) -> None:
    plan = saved[1].plan
    assert sum(bool(launch.boxes) for _, launch in plan.kernels) == 3
    driver, memory = launched(artifact, batch)
    for started, (step, launch) in zip(driver.started, plan.kernels, strict=True):
        assert started.threads == (384 if launch.boxes else 32 * launch.num_warps)
        assert started.programs == launch.grid_at(batch)[0]
        flat = {ref: memory.flat(name) for ref, name in step.buffers.items()}
        bound = execute.bind(launch, flat.__getitem__, batch)
        given = list(started.arguments)
        for name in launch.kernel.arg_names:
            if name in launch.boxes:
                described = bound[name]
                type_, rank, address, shape, strides, box, ones, *modes = given.pop(0)
                size = described.base.itemsize  # The network's result is fp32.
                assert type_ == f"CU_TENSOR_MAP_DATA_TYPE_FLOAT{8 * size}"
                assert address == described.base.data_ptr() and ones == [1] * rank
                assert shape == described.shape[::-1]
                assert strides == [size * stride for stride in described.strides[-2::-1]]
                # A row of 128 bytes is copied at a time, of the tensor's own box.
                assert box == described.block_shape[::-1] or box[0] <= described.block_shape[-1]
                width = min(128, size * described.block_shape[-1])
                assert modes[1] == f"CU_TENSOR_MAP_SWIZZLE_{width}B" and modes[-1]
                assert [given.pop(0) for _ in shape] == described.shape
                assert [given.pop(0) for _ in shape] == described.strides


def test_an_old_driver_is_corrected_for_small_tensors(artifact: Artifact) -> None:
    driver, _ = launched(artifact, 1, version=13_010)
    passed = [x for started in driver.started for x in started.arguments if isinstance(x, tuple)]
    assert len(passed) == 10 - (gluon.SMALL_VIEWS is not None) and not any(
        each[-1] for each in passed
    )


def test_what_the_driver_is_given_computes_the_network(saved: tuple[Path, Executable]) -> None:
    """The file's graph in its configurations, compiled again and emulated."""
    module, (x,) = network()
    loaded = convloom.load(saved[0], "emulator:sm_90")
    assert all("HOPPER" in str(step.tile) for step in loaded.plan.steps if step.op == "conv2d")
    (executable,) = loaded.executables
    assert isinstance(executable._runner, runtime.EmulatorRunner)
    torch.testing.assert_close(loaded(x).float(), module(x), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_the_file_is_what_its_graph_makes_of_it(artifact: Artifact) -> None:
    assert rederive.compares_code(artifact) and not rederive.differences(artifact)


BUFFER = Buffer("x", "input", HALF, 4 * 8 * 64 * 2, 4)
SOUND = Map((4, 8, 64), (512, 64, 1), (2, 8, 64), 0, 4, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (4, 8)}, "dimensions"),
        ({"shape": (4, 8, 0)}, "has shape"),
        ({"box": (2, 512, 64)}, "and swizzle 3"),
        ({"swizzle": 4}, "and swizzle 4"),
        ({"swizzle": 1}, "rows of 128 bytes, swizzle 1"),
        ({"box": (2, 8, 4), "swizzle": 1}, "rows of 8 bytes"),
        ({"offset": 4}, "offset 4 and strides"),
        ({"strides": (512, -64, 1)}, "and strides"),
        ({"strides": (512, 64, 2)}, "the last one is 1"),
        ({"batch": 3}, "4 rows for a batch of 3"),
        ({"shape": (4, 16, 64)}, "reaches byte 2,048 of 'x', which has 1,024 for a batch of 1"),
        ({"offset": 64}, "reaches byte 1,152 of 'x', which has 1,024 for a batch of 1"),
    ],
)  # fmt: skip
def test_maps_that_are_not_sound_are_refused(changes: dict[str, Any], message: str) -> None:
    assert SOUND.problem(BUFFER, (1, 4)) is None
    problem = replace(SOUND, **changes).problem(BUFFER, (1, 4))
    assert problem is not None and message in problem


def changed(program: Program, of: str, **changes: Any) -> Program:
    """The program with another map in the first argument of that kind of its first call that has
    one."""
    calls = list(program.calls)
    at, place = next(
        (i, j)
        for i, call in enumerate(calls)
        for j, argument in enumerate(call.arguments)
        if argument.map is not None and argument.kind == of
    )
    arguments = list(calls[at].arguments)
    arguments[place] = replace(arguments[place], **changes)
    calls[at] = replace(calls[at], arguments=tuple(arguments))
    return replace(program, calls=tuple(calls))


def test_results_are_only_written_where_a_program_says(artifact: Artifact) -> None:
    """Results leave in boxes too."""
    (program,) = artifact.programs
    (written,) = {
        each
        for each in program.calls[-1].arguments
        if each.kind == "write" and each.map is not None and each.operand is not None
    }
    assert written.map is not None and written.operand is not None
    program = changed(program, "write", map=replace(written.map, offset=8))
    document = replace(artifact.document, programs=(program,))
    members, tensors = set(artifact.archive.members), artifact.tensors
    with pytest.raises(ArtifactError, match=r"writes other parts of '.*' than it says"):
        check_document(document, members, tensors, (1, 1), "plan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map": None}, "of torch.float16 as box4"),
        ({"map": SOUND}, "of torch.float16 as box4"),
        ({"kind": "scratch"}, "would scratch '.*' through a tensor map"),
        ({"map": replace(SOUND, offset=4)}, "a tensor map of '.*' has offset 4"),
        ({"map": replace(SOUND, shape=(2, 8, 64), batch=2)}, "is of batch 2, the program of 4"),
    ],
)
def test_programs_with_other_maps_are_refused(
    artifact: Artifact, changes: dict[str, Any], message: str
) -> None:
    program = changed(artifact.programs[0], "read", **changes)
    document = replace(artifact.document, programs=(program,))
    members, tensors = set(artifact.archive.members), artifact.tensors
    check_document(artifact.document, members, tensors, (1, 1), "plan")
    with pytest.raises(ArtifactError, match=message):
        check_document(document, members, tensors, (1, 1), "plan")
