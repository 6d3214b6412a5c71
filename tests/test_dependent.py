"""Programmatic dependent launch: what the compiler makes of it, and who asks for it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom import settings
from convloom.compiler.api import lowered
from convloom.compiler.artifact import device as gpu
from convloom.compiler.artifact.read import open_artifact
from convloom.compiler.fusion import estimate
from convloom.compiler.graph.ir import CompileTarget, Graph
from convloom.compiler.graph.memory import Memory
from convloom.compiler.run.runtime import dtype_of
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import cost_model, programmatic_launch
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import NONE, Launch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import Target, parse
from convloom.kernels.devices import offline
from convloom.kernels.devices.offline import CompileRequest
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.normalisation.softmax import Softmax
from convloom.kernels.pooling.pool_window import MaxPool2d
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import nn

from . import harness, machine_code
from .nets import make
from .test_artifact_device import fake
from .test_separable import problem as separable_problem

SM_80, SM_90 = parse("cuda:sm_80"), parse("cuda:sm_90")
PROGRAMMATIC = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"


def launch_of(filters: int, target: Target = SM_90) -> Launch:
    """A convolution over 256 channels with residual and ReLU; of a 0x0 filter, an addition."""
    x = TensorSpec((4, 256, 14, 14), torch.float16, Layout.NHWC, batch=4)
    if not filters:
        asked = harness.problem_for(registry.get("add"), Pointwise(), (x, x))
        op = registry.get("add")
    else:
        op = registry.get("conv2d")
        w = TensorSpec((64, 256, filters, filters), torch.float16)
        attributes = Conv2d(padding=(filters // 2,) * 4)
        (y,) = op.infer(attributes, (x, w))
        asked = harness.problem_for(op, attributes, (x, w), (Stage("add"), Stage("relu")), (y,))

    (launch,) = op.launches(asked, next(iter(op.configs(asked, target))), target)
    return launch


def separable_launch() -> Launch:
    """A block whose operands stay in shared memory."""
    asked = separable_problem(256, 512, 28, stride=2, n=32)
    op = registry.get("separable")
    return op.launches(asked, op.default(asked, SM_90), SM_90)[0]


def alone_launch(name: str, attributes: Any, *filters: int) -> Launch:
    """An op on an image of 256 channels, with a weight of its own perhaps."""
    op, specs = registry.get(name), [TensorSpec((4, 256, 14, 14), torch.float16, Layout.NHWC)]
    specs += [TensorSpec(filters, torch.float16)] * bool(filters)
    asked = harness.problem_for(op, attributes, tuple(specs))
    return op.launches(asked, op.default(asked, SM_90), SM_90)[0]


POOL = MaxPool2d((3, 3), (2, 2), (1, 1))
ALONE = {
    "resident_kernel": separable_launch,
    "depthwise_kernel": partial(
        alone_launch, "conv2d", Conv2d(padding=(1,) * 4, groups=256), 256, 1, 3, 3
    ),
    "pool_kernel": partial(alone_launch, "max_pool2d", POOL),
}
CASES = {"gemm_kernel": 1, "tile_kernel": 3, "pointwise_kernel": 0}
FUSED = ("stem_kernel", "conv_chain_kernel", "gemv_kernel")


class Bottleneck(nn.Module):
    """A stem, the end of a bottleneck block, and a classifier of one row."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3)
        self.front = nn.Conv2d(width, width, 3, padding=1)
        self.wide = nn.Conv2d(width, 4 * width, 1)
        self.beside = nn.Conv2d(width, 4 * width, 1)
        self.last = nn.Linear(4 * width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.wide(torch.relu(self.front(x))) + self.beside(x))
        return torch.as_tensor(self.last(x.mean((2, 3))))


@lru_cache
def fused() -> dict[str, tuple[Launch, CompileRequest]]:
    """The launches of `Bottleneck` by kernel, and how they are compiled when programmatic."""
    x = torch.zeros(1, 3, 112, 112)
    _, plan, _ = lowered(Bottleneck().eval(), (x,), target="cuda:sm_90", dtype=torch.float16)
    found = {}
    for step, launch in plan.kernels:
        early = programmatic_launch.programmatic(launch, SM_90)
        request = offline.request(early, dtype_of(plan, step), SM_90)
        found[launch.kernel.fn.__name__] = launch, request
    return found


def request(launch: Launch, target: Target = SM_90) -> CompileRequest:
    return offline.request(launch, lambda ref: torch.float16, target)


@lru_cache(maxsize=8)
def compiled(case: str) -> Any:
    if case in FUSED:
        return offline.compile_request(fused()[case][1])
    launch = ALONE[case]() if case in ALONE else launch_of(CASES[case])
    assert launch.kernel.fn.__name__ == case
    return offline.compile_request(request(programmatic_launch.programmatic(launch, SM_90)))


def programmatic(filters: int) -> Launch:
    return programmatic_launch.programmatic(launch_of(filters), SM_90)


@pytest.mark.parametrize("case", [*CASES, *FUSED, *ALONE])
def test_a_programmatic_kernel_waits_before_it_touches_memory(case: str) -> None:
    """Once, before the loop: a wait inside a pipelined loop would come after its first copies. The
    next kernel may start right behind it, not only when the loop is over."""
    sass = offline.disassembly(compiled(case))
    opcodes = [found[2].split(".")[0] for found in machine_code.INSTRUCTION.finditer(sass)]
    wait, release = opcodes.index("ACQBULK"), opcodes.index("PREEXIT")
    touches = [at for at, name in enumerate(opcodes) if name in MEMORY]
    stores = [at for at, name in enumerate(opcodes) if name == "STG"]
    assert opcodes.count("ACQBULK") == 1 and opcodes.count("PREEXIT") == 1
    products = [at for at, name in enumerate(opcodes) if name in PRODUCTS]
    assert wait < min(touches) and wait < release < min(products + stores)
    loop = machine_code.hot_loop(sass)
    assert loop is not None or case != "tile_kernel", "short loops are unrolled, these are not"
    assert loop is None or not loop.count("ACQBULK") + loop.count("PREEXIT")
    assert compiled(case).metadata.launch_pdl, "Triton's launcher sets the attribute by this"


MEMORY = ("LDG", "LDGSTS", "STG", "ATOMG", "RED")
PRODUCTS = ("HGMMA", "HMMA")


@pytest.mark.parametrize("case", ["gemm_kernel", "tile_kernel", *FUSED[1:]])
def test_weights_are_asked_for_before_the_wait(case: str) -> None:
    """Into the cache alone: what the kernel in front writes is read behind the wait."""
    ptx = compiled(case).asm["ptx"]
    assert ptx.index("cp.async.bulk.prefetch.L2.global") < ptx.index("griddepcontrol.wait")
    sass = offline.disassembly(compiled(case))
    assert sass.index("UBLKPF") < sass.index("ACQBULK")
    wanted = fused()[case][1] if case in FUSED else request(programmatic(CASES[case]))
    assert not offline.resources(wanted).spill_bytes


def test_the_flag_compiles_out() -> None:
    launch = launch_of(3)
    assert not programmatic_launch.is_programmatic(launch.constexprs)
    made = offline.compile_request(request(launch))
    assert "griddepcontrol" not in made.asm["ptx"] and not made.metadata.launch_pdl
    assert "griddepcontrol.wait" in compiled("tile_kernel").asm["ptx"]


def test_only_kernels_and_targets_that_can_are_launched_so() -> None:
    launch = launch_of(3, SM_80)
    assert programmatic_launch.programmatic(launch, SM_80) is launch
    assert programmatic_launch.programmatic(launch, parse("interpreter")) is launch
    other = replace(launch, constexprs=NONE)
    assert programmatic_launch.programmatic(other, SM_90) is other
    changed = programmatic_launch.programmatic(launch, SM_90)
    assert programmatic_launch.is_programmatic(changed.constexprs)


# What is asked for ahead, in the emulator, which refuses bytes beside the weights.


class Layers(nn.Module):
    """Ragged tiles, a split sum, groups, rows of channels that are no sixteens of bytes, weights
    that are computed, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ragged = nn.Conv2d(24, 40, 3, padding=1)
        self.wide = nn.Conv2d(40, 512, 1)
        self.split = nn.Conv2d(512, 36, 3)
        self.odd = nn.Conv2d(36, 9, 1)
        self.grouped = nn.Conv2d(9, 64, (3, 1))
        self.groups = nn.Conv2d(64, 64, 3, groups=2)
        self.last = nn.Linear(64, 10)
        self.scale = nn.Parameter(torch.ones(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.odd(torch.relu(self.split(torch.relu(self.wide(self.ragged(x))))))
        x = self.groups(torch.relu(self.grouped(x))).flatten(2).mean(2)
        return torch.as_tensor(self.last(x @ (torch.sigmoid(x.t()) @ x)))


@pytest.mark.parametrize("batch", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_results_are_right_with_weights_asked_for(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setenv("CONVLOOM_LAUNCH", "programmatic")
    torch.manual_seed(0)
    module, x = Layers().eval(), torch.randn(batch, 24, 7, 6)
    exe = convloom.compile(module, (x,), target="emulator:sm_90", dtype=torch.float16)
    asked = [launch.constexprs for _, launch in exe.plan.kernels if "TILE" in launch.constexprs]
    assert sum(programmatic_launch.is_programmatic(each) for each in asked) >= 5
    assert any(each.get("SPLIT", 1) > 1 for each in asked)
    torch.testing.assert_close(exe(x), module(x), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("module", "shape", "kernels"),
    [(Bottleneck(16), (1, 3, 48, 48), FUSED[:2]), (nn.Linear(200, 21), (3, 200), FUSED[2:])],
)
def test_fused_kernels_that_start_early_are_right(
    monkeypatch: pytest.MonkeyPatch, module: nn.Module, shape: tuple[int, ...], kernels: Any
) -> None:
    monkeypatch.setenv("CONVLOOM_LAUNCH", "programmatic")
    torch.manual_seed(0)
    module, x = module.eval(), torch.randn(shape)
    exe = convloom.compile(module, (x,), target="emulator:sm_90", dtype=torch.float16)
    early = {
        launch.kernel.fn.__name__: programmatic_launch.is_programmatic(launch.constexprs)
        for _, launch in exe.plan.kernels
    }
    assert all(early[name] for name in kernels), early
    torch.testing.assert_close(exe(x), module(x), rtol=5e-3, atol=5e-3)


# What the model makes of it.


def test_the_model_knows_what_an_early_start_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels and machines that can, and no more than a launch costs."""
    x = TensorSpec((4, 256, 14, 14), torch.float16, Layout.NHWC, batch=4)
    add, copy = (
        harness.problem_for(registry.get(name), attributes, inputs)
        for name, attributes, inputs in (
            ("add", Pointwise(), (x, x)), ("softmax", Softmax(1), (x,)),
        )
    )  # fmt: skip
    for target, saved in ((SM_90, 0.96), (SM_80, 0.0)):
        machine = cost_model.machine_for(target)
        assert 0 <= machine.early_us < machine.launch_us
        for asked, expected in ((add, saved), (copy, 0.0)):
            op, times = registry.get(asked.op), []
            for launch in ("", "programmatic"):
                monkeypatch.setenv("CONVLOOM_LAUNCH", launch)
                times.append(cost_model.problem_us(op, asked, target))
            assert times[0] - times[1] == pytest.approx(expected)


def test_fusions_are_estimated_as_kernels_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    graph.goal = CompileTarget(SM_90, torch.float16)
    x = TensorSpec((4, 256, 14, 14), torch.float16, Layout.NHWC, batch=4)
    asked = harness.problem_for(registry.get("add"), Pointwise(), (x, x))
    late_us = estimate.problem_time_us(graph, asked)
    monkeypatch.setenv("CONVLOOM_LAUNCH", "programmatic")
    assert estimate.problem_time_us(graph, asked) == pytest.approx(late_us - 0.96)


# The option.


def network() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.max_pool2d(torch.relu(m.second(torch.relu(m.first(x)))), 2).softmax(1)

    return make(forward, (2, 16, 8, 8), first=nn.Conv2d(16, 16, 3), second=nn.Conv2d(16, 8, 1))


@pytest.mark.parametrize(
    ("launch", "target", "expected"),
    [
        ("", "cuda:sm_90", set()),
        ("programmatic", "cuda:sm_90", {"gemm_kernel", "tile_kernel", "pool_kernel"}),
        ("programmatic", "cuda:sm_80", set()),
        ("programmatic", "interpreter", set()),
    ],
)
def test_the_option_is_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, launch: str, target: str, expected: set[str]
) -> None:
    monkeypatch.setenv("CONVLOOM_LAUNCH", launch)
    module, inputs = network()
    plan = lowered(module, inputs, target=target, dtype=torch.float16, passes=())[1]
    found = {
        each.kernel.fn.__name__
        for _, each in plan.kernels
        if programmatic_launch.is_programmatic(each.constexprs)
    }
    assert found - {"pointwise_kernel"} == expected


def test_a_saved_file_launches_as_it_was_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CONVLOOM_LAUNCH", "programmatic")
    module, inputs = network()
    exe = convloom.compile(module, inputs, target="cuda:sm_90", tuning="heuristic", passes=())
    exe.save(tmp_path / "net.loom")
    monkeypatch.delenv("CONVLOOM_LAUNCH")
    artifact = open_artifact(tmp_path / "net.loom")
    (program,) = artifact.programs
    driver = fake(artifact, (program,))
    kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx=False)
    memory = Memory(program, gpu.upload(program, artifact.tensors, torch.device("cpu")), 2)
    for _, action in gpu.bind(driver, program, kernels, memory, lambda: 0):
        action()
    asked = [PROGRAMMATIC in dict(started.attributes) for started in driver.started]
    launches = [launch for _, launch in exe.plan.kernels]
    expected = [programmatic_launch.is_programmatic(launch.constexprs) for launch in launches]
    assert asked == expected and True in asked and False in asked


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("early", "expected programmatic, branches or clusters, got early"),
        ("branches, programmatic", "programmatic and branches exclude each other"),
    ],
)
def test_wrong_words_are_refused(
    monkeypatch: pytest.MonkeyPatch, launch: str, message: str
) -> None:
    monkeypatch.setenv("CONVLOOM_LAUNCH", launch)
    with pytest.raises(InvalidInputError, match=message):
        settings.read()
