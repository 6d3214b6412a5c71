"""The core of sm_90 whose warps do different things, as it is compiled: right in the emulator, and
chosen where it can run."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.compiler.records import rank
from convloom.kernels import registry
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Attributes, Config, Op, Problem, config, power_of_two
from convloom.kernels.contract.scalars import BY_NAME
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import parse
from convloom.kernels.devices import offline
from convloom.kernels.devices.emulator import FaultError
from convloom.kernels.fused.conv_mean import ConvMean
from convloom.kernels.fused.conv_pool import PAIR, ConvPool
from convloom.kernels.hopper import boxes, core, gluon, halo, kernel
from convloom.kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness, machine_code

pytestmark = pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))

SM_90 = parse("cuda:sm_90")
CONV, LINEAR = registry.get("conv2d"), registry.get("linear")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


class FewPrograms(harness.Emulator):
    """So many programs, each of which then takes several tiles; by a kernel of their own."""

    def __init__(self, programs: int, kernel: Any = None) -> None:
        super().__init__("sm_90")
        self.programs, self.kernel = programs, kernel

    def run(self, launch: Any, *others: Any) -> None:
        kernel = self.kernel or launch.kernel
        super().run(replace(launch, most_programs=self.programs, kernel=kernel), *others)


def conv(
    attributes: Conv2d,
    image: tuple[int, int],
    filters: tuple[int, int],
    channels: tuple[int, int],
    n: int = 2,
    epilogue: tuple[Stage, ...] = (Stage("relu"),),
    operands: str = "",
    dtype: torch.dtype = HALF,
) -> Problem:
    """A convolution. operands: of the epilogue, r for a residual, b for a bias."""
    x = TensorSpec((n, channels[0], *image), dtype, Layout.NHWC, batch=n)
    w = TensorSpec((channels[1], channels[0] // attributes.groups, *filters), dtype)
    return _problem(CONV, attributes, (x, w), epilogue, operands)


def pooled(asked: Problem, pool: MaxPool2d | AvgPool2d) -> Problem:
    """A convolution whose results, after its epilogue, are pooled, and then added up to a bias."""
    specs = tuple(each.spec for each in (*asked.inputs, *asked.operands))
    attributes = ConvPool(asked.attributes.expect(Conv2d), (), asked.epilogue, pool)
    bias = TensorSpec((asked.inputs[1].shape[0], 1, 1), SINGLE)
    made = harness.problem_for(
        registry.get("conv_pool"), attributes, specs, (Stage("add"),), (bias,)
    )  # fmt: skip
    inputs = (asked.inputs[0], *made.inputs[1:])  # It may be a slice.
    return replace(made, inputs=inputs, precision=asked.precision)


def averaged(asked: Problem, keepdim: bool = True) -> Problem:
    """A convolution whose results, after its epilogue, are averaged over each image, and then
    added to a bias."""
    specs = tuple(each.spec for each in (*asked.inputs, *asked.operands))
    attributes = ConvMean(asked.attributes.expect(Conv2d), (), asked.epilogue, keepdim)
    bias = TensorSpec((asked.inputs[1].shape[0], *(1, 1) * keepdim), SINGLE)
    made = harness.problem_for(
        registry.get("conv_mean"), attributes, specs, (Stage("add"),), (bias,)
    )  # fmt: skip
    inputs = (asked.inputs[0], *made.inputs[1:])
    return replace(made, inputs=inputs, precision=asked.precision)


def linear(
    rows: int,
    channels: tuple[int, int],
    epilogue: tuple[Stage, ...] = (Stage("relu"),),
    operands: str = "",
    dtype: torch.dtype = HALF,
) -> Problem:
    """A product; it has a batch of single rows."""
    x = TensorSpec((rows, channels[0]), dtype, batch=rows)
    specs = x, TensorSpec((channels[1], channels[0]), dtype)
    return _problem(LINEAR, Linear(), specs, epilogue, operands)


def _problem(
    op: Op, attributes: Attributes, specs: Any, epilogue: tuple[Stage, ...], operands: str
) -> Problem:
    (y,) = op.infer(attributes, specs)
    bias = TensorSpec((y.shape[1], *(1,) * (y.rank - 2)), SINGLE)
    read = tuple({"r": y, "b": bias}[each] for each in operands)
    return harness.problem_for(op, attributes, specs, epilogue, read)


def tile_of(
    problem: Problem, block: tuple[int, int], box: tuple[int, int, int] | None = None,
    stages: int = 3, depth: int = 64, way: int = core.SHARED,
) -> Config:  # fmt: skip
    """A configuration, legal for the problem, with a ring that is soon full."""
    box = box or (block[0], 1, 1)
    made = config(
        core.WARPS, stages, BLOCK_M=block[0], BLOCK_N=block[1], BLOCK_K=depth,
        BOX_N=box[0], BOX_H=box[1], BOX_W=box[2], HOPPER=way,
    )  # fmt: skip
    assert registry.get(problem.op).legal(problem, made, SM_90) is None
    return made


def check(
    problem: Problem, tile: Config, programs: int = 2, batch: int | None = None, seed: int = 0,
    kernel: Any = None,
) -> None:  # fmt: skip
    """Emulates a problem of small whole numbers, all of whose sums are exact.

    batch: of this call, the largest by default; kernel: in the place of the core's own.
    """
    op, y = registry.get(problem.op), problem.output.spec
    inputs, operands = (
        tuple(
            harness.make_integers(each.spec, seed + 10 * at + len(group), -2, 2)
            for at, each in enumerate(group)
        )
        for group in (problem.inputs, problem.operands)
    )
    device, held = FewPrograms(programs, kernel), batch or y.batch or 1
    results = harness.run_on(device, op, problem, inputs, operands, tile, held)
    exact = harness.expected(op, problem, inputs, operands)
    rounded = exact[0].to(y.dtype)
    if y.batch is not None:
        assert results[0][held:].isnan().all()
        rounded, results = rounded[:held], (results[0][:held],)
    if _is_exact(problem) and problem.op != "conv_mean":
        assert torch.equal(results[0], rounded)
    elif _is_exact(problem):  # Quotients, rounded once more.
        most = torch.finfo(y.dtype).eps
        torch.testing.assert_close(results[0], rounded, rtol=most, atol=1e-6)
    else:
        torch.testing.assert_close(results[0], rounded, rtol=2e-2, atol=2e-2)


def _is_exact(problem: Problem) -> bool:
    """Whether every stage makes whole numbers of whole numbers."""
    stages = (*problem.epilogue, *getattr(problem.attributes, "stages", ()))
    return {stage.name for stage in stages} <= {"add", "relu", "sub", "maximum", "mul"}


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting workers takes longer than what these tests compile."""
    monkeypatch.setattr(offline, "_compile_apart", lambda wanted: None)


ADDED = Stage("add"), Stage("add"), Stage("relu")
SAME = Conv2d((1, 1), (1, 1, 1, 1))
HALVED = Conv2d((2, 2), (1, 1, 1, 1))
OVERHANGING = MaxPool2d(PAIR, PAIR, ceil_mode=True)


def cases() -> Iterator[Any]:
    """Problems with their tiles, programs and batch."""
    asked = conv(SAME, (9, 11), (3, 3), (64, 72), 2, ADDED, "rb")
    yield "3x3", asked, tile_of(asked, (128, 128), (1, 8, 16), 3), 2, None
    asked = conv(HALVED, (8, 12), (3, 3), (64, 64), 5, ADDED, "rb", BRAIN)
    yield "3x3 stride 2, bf16, 4 of 5 images", asked, tile_of(asked, (128, 64), (4, 4, 8), 2), 1, 4
    asked = conv(Conv2d((1, 1), (2, 4, 3, 1), (2, 3)), (7, 12), (3, 2), (40, 40), 3, ADDED, "rb")
    asked = replace(asked, inputs=(replace(asked.inputs[0], pitch=64, offset=8), asked.inputs[1]))
    yield "dilated, ragged, a slice", asked, tile_of(asked, (256, 64), (2, 8, 16), 2), 2, None
    asked = pooled(conv(SAME, (17, 15), (3, 3), (64, 136), 2, ADDED, "rb"), OVERHANGING)
    yield "pooled, ragged", asked, tile_of(asked, (128, 256), (1, 8, 16), 3), 2, 1
    asked = averaged(conv(Conv2d(), (7, 7), (1, 1), (72, 136), 5, ADDED, "rb"))
    yield "1x1, averaged", asked, tile_of(asked, (128, 128), (2, 8, 8), 2), 2, 4
    asked = averaged(conv(HALVED, (16, 8), (3, 3), (64, 64), 3, ADDED, "rb", BRAIN), keepdim=False)
    yield "3x3, averaged in turns", asked, tile_of(asked, (128, 64), (2, 8, 8), 2, way=2), 1, None
    asked = linear(300, (200, 264), ADDED, "rb")
    yield "linear, ragged", asked, tile_of(asked, (128, 256)), 2, None
    asked = conv(SAME, (9, 11), (3, 3), (64, 72), 3, ADDED, "rb")
    turns = core.IN_TURNS
    yield "3x3 in turns", asked, tile_of(asked, (128, 64), (1, 8, 16), 2, way=turns), 1, None
    asked = linear(700, (136, 128), ADDED, "rb", BRAIN)
    yield "linear in turns", asked, tile_of(asked, (128, 128), stages=4, way=turns), 2, 650
    asked = conv(SAME, (9, 11), (3, 3), (64, 75), 2, ADDED, "rb")
    yield "3x3, stored by threads", asked, tile_of(asked, (128, 128), (1, 8, 16), 3), 2, None
    asked = replace(conv(Conv2d(), (9, 9), (1, 1), (96, 64), 4, dtype=SINGLE), precision="tf32")
    yield "1x1, tf32", asked, tile_of(asked, (256, 128), stages=2, depth=32), 1, None
    if gluon.SMALL_VIEWS is not None:
        return
    rows = core.HALO
    asked = conv(Conv2d((1, 1), (2, 0, 0, 1)), (18, 17), (3, 3), (64, 64), 2, ADDED, "rb")
    yield "halo, weights stay", asked, tile_of(asked, (256, 64), (1, 16, 16), 2, way=rows), 2, 1
    asked = pooled(conv(SAME, (16, 16), (3, 3), (64, 64), 3), AvgPool2d(PAIR, PAIR))
    yield "halo, pooled", asked, tile_of(asked, (256, 64), (2, 16, 8), 2, way=rows), 1, None
    groups = Conv2d((1, 1), (1, 1, 1, 1), groups=16)
    asked = conv(groups, (9, 18), (3, 3), (64, 64), 3, ADDED, "rb")
    yield "halo, groups of 4", asked, tile_of(asked, (256, 32), (2, 8, 16), 3, 32, rows), 2, 2
    asked = conv(SAME, (9, 30), (3, 3), (72, 136), 1, ADDED, "rb", BRAIN)
    yield "halo, ragged", asked, tile_of(asked, (256, 128), (1, 8, 32), 2, way=rows), 1, None


CASES = {name: rest for name, *rest in cases()} if gluon.MISSING is None else {}


RARE = (
    "3x3", "1x1, tf32", "linear, ragged", "linear in turns", "halo, ragged", "halo, pooled",
    "two products under way", "wrong parity of the residual", "results announced too early",
    "wrong parity of the consumers", "wrong parity of a halo's weights",
    "pixels of a halo released while a product reads them", "a turn that never comes",
)  # fmt: skip


def often(names: Iterable[str]) -> list[Any]:
    """Parameters, of which those that are alike to others are only run with the slow tests."""
    marks = pytest.mark.slow
    return [pytest.param(name, marks=marks if name in RARE else ()) for name in names]


@pytest.mark.parametrize("name", often(CASES))
def test_results_are_exact_in_the_emulator(name: str) -> None:
    problem, tile, programs, batch = CASES[name]
    check(problem, tile, programs, batch)


@pytest.mark.skipif(gluon.SMALL_VIEWS is not None, reason=str(gluon.SMALL_VIEWS))
def test_what_is_not_finite_stays_in_its_group() -> None:
    """Zero times infinity is NaN: of such a tile every group is added up alone. Both groups of
    warps find their own, on the edge of an image and inside."""
    problem, tile, programs, _ = CASES["halo, groups of 4"]
    problem = replace(problem, epilogue=(), operands=())
    x, w = (harness.make_integers(each.spec, at, -2, 2) for at, each in enumerate(problem.inputs))
    x[0, 5, 0, 0], x[1, 41, 8, 17], x[2, 0, 4, 4] = float("inf"), float("-inf"), float("nan")
    device = FewPrograms(programs)
    (found,) = harness.run_on(device, CONV, problem, (x, w), (), tile, 3)
    (exact,) = harness.expected(CONV, problem, (x, w), ())
    assert torch.equal(found.nan_to_num(), exact.to(HALF).nan_to_num())
    assert 0 < found.isnan().sum() + found.isinf().sum() <= 3 * 4 * 9
    others = [channel for channel in range(64) if channel // 4 not in (0, 1, 10)]
    assert found[:, others].isfinite().all()


EPILOGUES = {
    "": (), "r": (Stage("add"),), "b": (Stage("add"), Stage("relu")), "rb": ADDED,
    "br": (Stage("mul"), Stage("sub", reverse=True), Stage("maximum", literal=-3.0)),
}  # fmt: skip
FUNCTIONS = ("silu", "gelu", "tanh", "hardswish", "clamp", "leaky_relu", "sigmoid", "mish")


MOST_STEPS = 60
"""Of all tiles of a drawn problem together; the emulator takes 10 a second."""


def drawn(way: int, seed: int) -> tuple[Problem, Config, int, int]:
    """A small problem with tiles of a way, programs and batch that a seed draws."""
    pick = random.Random(1_000 * way + seed)
    while True:
        asked, tile, programs, batch = _attempt(pick, way)
        launch = core.launch(asked, tile, SM_90)
        if 2 <= launch.tiles_at(batch) <= MOST_STEPS / launch.steps:
            return asked, tile, programs, batch


def _attempt(pick: random.Random, way: int) -> tuple[Problem, Config, int, int]:
    dtype = pick.choice((HALF, HALF, BRAIN, SINGLE))
    operands = pick.choice(list(EPILOGUES))
    chain = EPILOGUES[operands]
    if pick.random() < 0.4:
        name = pick.choice(FUNCTIONS)
        chain = (*chain, Stage(name, pick.choice(BY_NAME[name].examples)))
    depth = 32 if dtype is SINGLE else pick.choice((64, 64, 32))
    sizes = [each for each in core.TILES if each[2] == way and each[1] != core.GROUPED]
    *block, _ = pick.choice(sizes)
    n, k = pick.randint(1, 5), 8 * pick.randint(1, 36) - pick.choice((0, 0, 0, 0, 1))
    c = 8 * pick.randint(4, 20)
    if way != core.HALO and pick.random() < 0.3:
        asked = linear(pick.randint(1, 700), (c, k), chain, operands, dtype)
        box = None
    else:
        has_halo = way == core.HALO
        stride = 1 if has_halo else pick.choice((1, 1, 2))
        filters = (1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 7), (3, 2)
        r, s = (3, 3) if has_halo else pick.choice(filters)
        c = -(-c // depth) * depth if stride == 2 else c
        groups = 1
        if has_halo and pick.random() < 0.3:
            c = k = core.GROUPED * pick.randint(1, 4)
            groups, depth, block = c // pick.choice((2, 4, 8, 16)), core.GROUPED, [256, 32]
        dilation = (1, 1) if has_halo else (pick.choice((1, 1, 2)), pick.choice((1, 1, 3)))
        padding = tuple(pick.randint(0, 3) for _ in range(4))
        least = max(dilation[0] * (r - 1), dilation[1] * (s - 1)) + 1
        image = tuple(2 * pick.randint(-(-least // 2), -(-least // 2) + 6) for _ in range(2))
        attributes = Conv2d((stride, stride), padding, dilation, groups)
        asked = conv(attributes, image, (r, s), (c, k), n, chain, operands, dtype)
        wide, high = 1 << pick.randint(1, 4), 1 << pick.randint(1, 3)
        if has_halo:
            wide, high = pick.choice(((16, 16), (32, 8), (8, 8), (4, 8), (2, 8), (4, 16), (64, 2)))
        box = (
            None if attributes.is_product((k, c, r, s)) else (block[0] // wide // high, high, wide)
        )
    if dtype is SINGLE:
        asked = replace(asked, precision="tf32")
    if pick.random() < 0.3:
        x, y = asked.inputs[0], asked.output
        x = replace(x, pitch=x.pitch + 24, offset=8)
        y = replace(y, pitch=y.pitch + 16, offset=8)
        asked = replace(asked, inputs=(x, asked.inputs[1]), outputs=(y,))
    fits = (SM_90.shared_bytes - core.END_BYTES) // (sum(block) * depth * dtype.itemsize)
    if way == core.HALO and box is not None and box[1] == 2:
        fits = 2  # Four rows for two.
    tile = tile_of(asked, (block[0], block[1]), box, pick.randint(2, min(4, fits)), depth, way)
    batch = pick.randint(1, asked.output.spec.batch or 1)
    return asked, tile, pick.randint(1, 4), batch


WAYS = {"shared": core.SHARED, "in turns": core.IN_TURNS, "halo": core.HALO}


def drawn_pooled(way: int, seed: int) -> tuple[Problem, Config, int, int]:
    """As `drawn`, of convolutions in boxes that hold windows, which are pooled."""
    pick = random.Random(seed)
    while True:
        asked, tile, programs, batch = drawn(way, pick.randint(0, 1 << 30))
        attributes = asked.attributes
        if not isinstance(attributes, Conv2d) or not min(asked.output.shape) > 1:
            continue
        if attributes.groups > 1:
            continue
        average = AvgPool2d(PAIR, PAIR, divisor_override=pick.choice((None, 2)))
        pool = pick.choice((OVERHANGING, MaxPool2d(PAIR, PAIR), average))
        asked = pooled(asked, pool)
        launch = core.launch(asked, tile, SM_90)
        if (
            not boxes.splits_windows(asked, boxes.box_of(tile), way == core.HALO)
            and launch.tiles_at(batch) > 1
        ):
            return asked, tile, programs, batch


def drawn_averaged(way: int, seed: int) -> tuple[Problem, Config, int, int]:
    """As `drawn`, of convolutions that are averaged, in boxes that hold whole images."""
    pick = random.Random(seed)
    while True:
        asked, tile, programs, batch = drawn(way, pick.randint(0, 1 << 30))
        if not isinstance(asked.attributes, Conv2d) or asked.output.spec.rank != 4:
            continue
        high, wide = (power_of_two(size) for size in asked.output.shape[2:])
        if 2 * high * wide > tile["BLOCK_M"]:
            continue
        box = {"BOX_N": tile["BLOCK_M"] // high // wide, "BOX_H": high, "BOX_W": wide}
        tile = replace(tile, blocks=tuple({**dict(tile.blocks), **box}.items()))
        asked = averaged(asked, pick.random() < 0.5)
        if core.legal(asked, tile, SM_90) is None:
            return asked, tile, programs, batch


DRAWS = [
    (draw, seed)
    for draw, count in ((drawn, 60), (drawn_pooled, 20), (drawn_averaged, 20))
    for seed in range(count)
]


@pytest.mark.slow
@pytest.mark.parametrize(("draw", "seed"), DRAWS)
@pytest.mark.parametrize("way", WAYS)
def test_drawn_problems_are_exact_in_the_emulator(way: str, draw: Any, seed: int) -> None:
    if way == "halo" and gluon.SMALL_VIEWS is not None:
        pytest.skip(gluon.SMALL_VIEWS)
    if way == "halo" and draw is drawn_averaged:
        pytest.skip("half of a halo holds half of every image")
    check(*draw(WAYS[way], seed), seed=seed)


# What the emulator must not let pass.

FAULTS = {
    "no wait for an empty slot": (
        "                mbarrier.wait(empty.index(slot), phase)\n", "",
        "more threads arrive at an mbarrier|a product under way reads|another warp read since",
    ),
    "wrong parity of the producer": (
        "phase = 1  #", "phase = 0  #", "an mbarrier that nothing under way will end",
    ),
    "wrong parity of the consumers": (
        "    slot = 0\n    phase = 0\n", "    slot = 0\n    phase = 1\n",
        "nothing was written to|before the copy into it|nothing under way will end",
    ),
    "a slot released while its product runs": (
        "arrive(empty.index(before), count=1, pred=step > 0)",
        "arrive(empty.index(slot), count=1, pred=step > 0)",
        "a product under way reads|that another warp read since|nothing under way will end",
    ),
    "two products under way": (
        "num_outstanding=1", "num_outstanding=2",
        "a product under way reads|that another warp read since",
    ),
    "only one group asked": (
        "1 if TURNS else 2", "1",
        "a product under way reads|that another warp read since|mbarrier",
    ),
    "a turn before its time": (
        "            mbarrier.wait(order.index(WHO), (turn + 1 - WHO) % 2)\n", "",
        "nothing was written to|before the copy into it|mbarrier|another warp read since",
    ),
    "pixels of a halo released while a product reads them": (
        "mbarrier.arrive(x_empty.index(before), count=1, pred=step > 0)",
        "mbarrier.arrive(x_empty.index(slot), count=1)",
        "a product under way reads|that another warp read since|mbarrier",
    ),
    "weights of a halo released while a product reads them": (
        "mbarrier.arrive(w_empty.index(w_before), count=1, pred=(step > 0) | (r > 0))",
        "mbarrier.arrive(w_empty.index(w_slot), count=1)",
        "a product under way reads|that another warp read since|mbarrier",
    ),
    "wrong parity of a halo's weights": (
        "w_slot = 0\n    w_phase = 0\n", "w_slot = 0\n    w_phase = 1\n",
        "nothing was written to|before the copy into it|nothing under way will end",
    ),
    "results left before they are written": (
        "                mbarrier.wait(written.index(who), (item // 2 + 1) % 2)\n", "",
        "no fence.proxy.async made visible|a copy|nothing was written to|mbarrier",
    ),
    "results announced too early": (
        "        fence_async_shared()\n        mbarrier.arrive(written.index(WHO), count=1)\n",
        "        mbarrier.arrive(written.index(WHO), count=1)\n",
        "no fence.proxy.async made visible",
    ),
    "a residual that is not waited for": (
        "        mbarrier.wait(ready.index(WHO), parity)\n", "",
        "before the copy into it|nothing was written to|mbarrier|another warp read since",
    ),
    "wrong parity of the residual": (
        "        parity ^= 1\n", "",
        "before the copy into it|nothing was written to|mbarrier|another warp read since",
    ),
    "a residual asked for while results leave": (
        "                tma.store_wait(pendings=0)\n", "", "a product under way reads, or a copy",
    ),
    "a turn that never comes": (
        "mbarrier.arrive(order.index(1 - WHO), count=1)", "pass",
        "an mbarrier that nothing under way will end",
    ),
}  # fmt: skip


def planted(
    file: Any, text: str, replacement: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A module of kernels with some of its text replaced."""
    sound = Path(file.__file__).read_text()
    assert text in sound
    path = folder / "planted.py"
    path.write_text(sound.replace(text, replacement))
    name = f"{file.__name__}_{hashlib.sha256((text + replacement).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", often(FAULTS))
def test_planted_faults_are_refused_by_the_emulator(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, replacement, message = FAULTS[fault]
    file = halo if "halo" in fault else kernel
    if file is halo and gluon.SMALL_VIEWS is not None:
        pytest.skip(gluon.SMALL_VIEWS)
    module = planted(file, text, replacement, tmp_path, monkeypatch)
    reads = "residual" in fault
    asked = conv(SAME, (8, 16), (3, 3), (64, 64), 3, ADDED if reads else (), "rb" if reads else "")
    way = core.IN_TURNS if "turn" in fault else core.SHARED
    tile, made = tile_of(asked, (128, 64), (1, 8, 16), 2, way=way), "hopper_kernel"
    if file is halo:
        asked = conv(SAME, (16, 16), (3, 3), (64, 72), 3)
        tile = tile_of(asked, (256, 64), (1, 16, 16), 2, way=core.HALO)
        made = "halo_kernel"
    with pytest.raises(FaultError, match=message):
        check(asked, tile, 1, kernel=getattr(module, made))


# What it compiles to.

COMPILED = {
    "3x3, residual": conv(SAME, (56, 56), (3, 3), (256, 256), 32, ADDED, "rb"),
    "1x1, gelu": conv(
        Conv2d(), (56, 56), (1, 1), (256, 256), 32, (Stage("add"), Stage("gelu")), "b"
    ),
    "3x3 stride 2, 64 channels": conv(HALVED, (56, 56), (3, 3), (64, 64), 32, ADDED, "rb"),
    "linear": linear(4096, (1024, 4096), (Stage("add"), Stage("silu")), "b", BRAIN),
}  # fmt: skip
COMPILED["1x1, averaged"] = averaged(conv(Conv2d(), (7, 7), (1, 1), (512, 2048), 256, ADDED, "rb"))
COMPILED["3x3, groups"] = conv(
    replace(SAME, groups=32), (56, 56), (3, 3), (128, 128), 32, (Stage("add"), Stage("relu")), "b"
)
COMPILED["3x3, pooled"] = pooled(COMPILED["3x3, residual"], OVERHANGING)


@pytest.mark.parametrize("name", list(COMPILED)[:1])
def test_the_first_tile_is_compiled_without_spills(name: str) -> None:
    compiles_well(COMPILED[name], next(iter(core.tiles(COMPILED[name], SM_90))))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_every_tile_is_compiled_without_spills(name: str) -> None:
    for tile in core.tiles(COMPILED[name], SM_90):
        compiles_well(COMPILED[name], tile)


def compiles_well(problem: Problem, tile: Config) -> None:
    """Boxes that are read by the copy engine, wide products, and little beside them in the loop."""
    op, way = registry.get(problem.op), tile[core.BLOCK]
    (wanted,) = rank.requests(op, problem, op.launches(problem, tile, SM_90), SM_90)
    found = offline.report(wanted)
    assert found.spill_bytes == 0 and found.registers == 168, (tile, found)
    assert found.shared_bytes <= core.shared_bytes(problem, tile, SM_90), (tile, found)
    assert found.count("UTMALDG") >= 2 and not found.count("LDGSTS")
    (launch,) = op.launches(problem, tile, SM_90)
    if launch.constexprs["PIXELS"].copied:
        assert found.count("UTMASTG") and found.count("STSM") and not found.count("STG")
        results = problem.output.spec.numel
        assert ("residual" in launch.boxes) == any(
            each.spec.numel == results for each in problem.operands
        )
    else:
        assert found.count("STG.128") and not found.count("UTMASTG")
    compiled = offline.compile_request(wanted)
    assert compiled.metadata.num_warps == 12
    loop = machine_code.hot_loop(offline.disassembly(compiled))
    high = tile["BLOCK_M"] // (64 if way == core.IN_TURNS else 128)
    taps = 3 if way == core.HALO else 1
    assert loop is not None and loop.count(f"HGMMA.64x{tile['BLOCK_N']}x16") == (
        tile["BLOCK_K"] // 16 * high * taps
    )
    beside = len(loop.opcodes) - loop.count("HGMMA")
    assert beside <= 65 * taps and loop.count("WARPGROUP.DEPBAR") == taps, (tile, loop.opcodes)
    expected = core.HALO_INSTRUCTIONS if way == core.HALO else core.STEP_INSTRUCTIONS
    assert beside <= 1.25 * expected
    wide = problem.inputs[1].shape[0] >= 128 and launch.constexprs.get("GROUP", 0) == 0
    if wide and tile == next(iter(core.tiles(problem, SM_90))):
        assert tile["BLOCK_N"] >= 128
