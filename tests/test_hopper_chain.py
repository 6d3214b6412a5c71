"""Chains of convolutions by the Hopper core: right in the emulator, chosen where they can run, and
compiled without spills."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.records import rank
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem
from convloom.kernels.contract.scalars import BY_NAME
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import parse
from convloom.kernels.devices import offline
from convloom.kernels.devices.emulator import FaultError
from convloom.kernels.fused import links
from convloom.kernels.fused.chains import conv_chain_hopper as hopper
from convloom.kernels.fused.chains.conv_chain import ConvChain
from convloom.kernels.hopper import chain, core, gluon
from convloom.kernels.tile import conv_geometry
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import nn

from . import harness, machine_code
from .test_hopper import (
    ADDED,
    BRAIN,
    EPILOGUES,
    FUNCTIONS,
    HALF,
    HALVED,
    SAME,
    SINGLE,
    SM_90,
    FewPrograms,
    planted,
)
from .test_hopper import compiled_here as compiled_here

pytestmark = pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))

CHAIN = registry.get("conv_chain")
BIAS = Stage("add"), Stage("relu")


def problem(
    image: tuple[int, int], channels: tuple[int, int, int], n: int = 2,
    stages: tuple[Any, ...] = ADDED, operands: str = "rb", dtype: torch.dtype = HALF,
    last: tuple[Any, ...] = BIAS, last_operands: str = "b",
    front: Conv2d | None = None, filters: tuple[int, int, int] = (64, 3, 3),
    before: tuple[Any, ...] = BIAS, front_operands: str = "b",
) -> Problem:  # fmt: skip
    """An expansion and a reduction of an image; operands as in `test_hopper.conv`. front: in front
    of both, with filters of so many channels, rows and columns."""
    c, wide, narrow = channels
    x = TensorSpec((n, c, *image), dtype, Layout.NHWC, batch=n)
    specs = [x]
    if front is not None:
        specs.append(TensorSpec((c, *filters), dtype))
        x = x.with_(shape=(n, front.groups * filters[0], *image))
        (t,) = conv_geometry.infer(front, (x, specs[-1]))
        specs[0], image = x, t.shape[2:]

    def read(of: int, operands: str) -> Iterator[TensorSpec]:
        for each in operands:
            yield x.with_(shape=(n, of, *image)) if each == "r" else TensorSpec((of, 1, 1), SINGLE)

    if front is not None:
        specs += read(c, front_operands)
    specs += TensorSpec((wide, c, 1, 1), dtype), *read(wide, operands)
    specs += TensorSpec((narrow, wide, 1, 1), dtype), *read(narrow, last_operands)
    attributes = ConvChain(front, before if front else (), stages, True, last)
    return harness.problem_for(CHAIN, attributes, tuple(specs))


def moved(asked: Problem, **places: dict[str, int]) -> Problem:
    """With other pitches and offsets: of x, y and z."""
    (x, *others), (y, z) = asked.inputs, asked.outputs
    x, y, z = (
        replace(each, **places.get(name, {})) for name, each in (("x", x), ("y", y), ("z", z))
    )
    return replace(asked, inputs=(x, *others), outputs=(y, z))


def check(
    asked: Problem, tile: Config, programs: int = 2, batch: int | None = None, seed: int = 0,
    kernel: Any = None,
) -> None:  # fmt: skip
    """Emulates a chain of small whole numbers; where all stages make such, every sum is exact."""
    assert CHAIN.legal(asked, tile, SM_90) is None
    inputs = tuple(
        harness.make_integers(each.spec, seed + 10 * at, -1, 1)
        for at, each in enumerate(asked.inputs)
    )
    held = batch or asked.output.spec.batch or 1
    device = FewPrograms(programs, kernel)
    results = harness.run_on(device, CHAIN, asked, inputs, (), tile, held)
    attributes = asked.attributes.expect(ConvChain)
    names = {stage.name for link in attributes.links for stage in link.stages}
    for result, right in zip(results, expected(attributes, inputs), strict=True):
        rounded = right[:held]
        assert result[held:].isnan().all()
        if names <= {"add", "relu", "sub", "maximum", "mul"}:
            assert torch.equal(result[:held], rounded)
        else:
            scale = float(rounded.abs().max())
            torch.testing.assert_close(result[:held], rounded, rtol=2e-2, atol=2e-2 * scale)


def expected(attributes: ConvChain, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """y and z by torch, each link's result rounded as it is stored."""
    where, value, found = links.slots(attributes.links), inputs[0], []
    for link in attributes.links:
        operands = tuple(each.double() for each in inputs[where.operands[link.name]])
        w = inputs[where.tensors[link.tensors[0]]].double()
        exact = conv_geometry.reference(link.conv or Conv2d(), value.double(), w)
        value = ep.apply_reference(link.stages, exact, operands).to(inputs[0].dtype)
        found.append(value)
    return found[-2:]


def tile_of(
    asked: Problem, *depths: int, box: tuple[int, int, int] = (hopper.PIXELS, 1, 1)
) -> Config:
    """A configuration by its slots of pixels and of weights, and its places for results."""
    made = hopper._tile(asked, box, *depths)
    assert hopper.legal(asked, made, SM_90) is None
    return made


def cases() -> Iterator[Any]:
    """Problems with their tiles, programs and batch."""
    asked = problem((9, 11), (64, 128, 64), 3)
    yield "residual", asked, tile_of(asked, 1, 2, 2), 2, None
    asked = problem((9, 11), (120, 200, 112), 3, BIAS, "b", BRAIN)
    yield "ragged, bf16, 2 of 3 images", asked, tile_of(asked, 2, 3, 3), 1, 2
    asked = moved(
        problem((8, 9), (64, 192, 64), 4, (), "", last=(), last_operands=""),
        x={"pitch": 88, "offset": 8}, y={"pitch": 208, "offset": 16}, z={"pitch": 72},
    )  # fmt: skip
    yield "slices, no stages", asked, tile_of(asked, 1, 2, 2), 1, None
    asked = problem((9, 15), (256, 192, 256), 2)
    yield "256 channels", asked, tile_of(asked, 1, 2, 2), 1, None
    asked = problem((8, 8), (64, 128, 128), 5, last=ADDED, last_operands="rb")
    yield "residuals of both", asked, tile_of(asked, 2, 4, 3), 2, 4
    asked = problem((8, 8), (64, 128, 64), 5, (Stage("add"), Stage("add")), "rr")
    yield "two residuals, read by threads", asked, tile_of(asked, 2, 2, 2), 1, None
    asked = problem((9, 11), (64, 128, 64), 3, front=SAME)
    yield "3x3 in front, weights stay", asked, tile_of(asked, 2, 2, 2, box=(1, 8, 16)), 1, 2
    asked = problem((8, 15), (72, 200, 64), 3, BIAS, "b", BRAIN, front=SAME, filters=(40, 3, 3))
    yield "3x3 in front, ragged", asked, tile_of(asked, 3, 2, 3, box=(2, 8, 8)), 2, None
    asked = problem((12, 18), (128, 192, 64), 2, front=HALVED, filters=(64, 3, 3), before=ADDED,
                    front_operands="rb")  # fmt: skip
    yield "stride 2 in front, a residual", asked, tile_of(asked, 2, 2, 2, box=(4, 4, 8)), 1, None
    # NaN behind the last channel alone.
    nan = Stage("mul", literal=float("inf"), channels=(72, 128)), Stage("relu")
    asked = problem((8, 8), (64, 72, 64), 3, nan, "", dtype=BRAIN)
    yield "zeros behind the last channel", asked, tile_of(asked, 2, 2, 2), 1, None


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many channels fill up others."""
    monkeypatch.setattr(hopper, "MOST_WASTE", 99.0)


with pytest.MonkeyPatch.context() as waste:
    waste.setattr(hopper, "MOST_WASTE", 99.0)
    CASES = {name: rest for name, *rest in cases()} if gluon.MISSING is None else {}
RARE = (
    "256 channels", "two residuals, read by threads", "slices, no stages", "residuals of both",
    "wrong parity of the weights", "wrong parity of the pixels", "wrong parity of the places",
    "one group asked", "a place taken before it has left", "3x3 in front, ragged",
    "stride 2 in front, a residual",
)  # fmt: skip


def usual(names: Any) -> list[Any]:
    """As `often`, of this file's."""
    return [
        pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in names
    ]


@pytest.mark.parametrize("name", usual(CASES))
def test_chains_are_exact_in_the_emulator(name: str, padded: None) -> None:
    asked, tile, programs, batch = CASES[name]
    check(asked, tile, programs, batch)


def drawn(seed: int) -> tuple[Problem, Config, int, int]:
    """A small chain that a seed draws, with a configuration, programs and batch."""
    pick = random.Random(seed)
    while True:
        channels = 8 * pick.randint(4, 20), 8 * pick.randint(4, 32), 8 * pick.randint(4, 20)
        chains: list[Any] = []
        for _ in range(3):
            operands = pick.choice(list(EPILOGUES))
            stages: tuple[Any, ...] = EPILOGUES[operands]
            if pick.random() < 0.2:
                name = pick.choice(FUNCTIONS)
                stages = (*stages, Stage(name, pick.choice(BY_NAME[name].examples)))
            chains.append((stages, operands))
        image, n = (2 * pick.randint(2, 6), 2 * pick.randint(2, 6)), pick.randint(1, 5)
        dtype, box = pick.choice((HALF, BRAIN)), (hopper.PIXELS, 1, 1)
        front, depth, r, s = None, 8 * pick.randint(4, 16), *pick.choice(((3, 3), (1, 3), (5, 2)))
        if pick.random() < 0.5:
            stride, padding = pick.choice((1, 1, 2)), tuple(pick.randint(0, 2) for _ in range(4))
            front = Conv2d((stride, stride), padding, (1, pick.choice((1, 1, 2))))
            depth = -(-depth // 64) * 64 if stride == 2 else depth
            high, wide = 1 << pick.randint(1, 3), 1 << pick.randint(1, 4)
            box = hopper.PIXELS // high // wide, high, wide
        try:
            asked = problem(
                image, channels, n, *chains[0], dtype, *chains[1], front, (depth, r, s), *chains[2]
            )
        except InvalidInputError:
            continue
        if pick.random() < 0.3:
            place = {"pitch": 8 * pick.randint(40, 50), "offset": 8}
            asked = moved(asked, **{pick.choice("xyz"): place})
        depths = pick.randint(1, 4), pick.randint(2, 4), pick.randint(2, 3)
        tile = hopper._tile(asked, box, *depths)
        if hopper.legal(asked, tile, SM_90) is None:
            return asked, tile, pick.randint(1, 3), pick.randint(1, n)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_drawn_chains_are_exact_in_the_emulator(seed: int, padded: None) -> None:
    check(*drawn(seed), seed=seed)


# What the emulator must not let pass.

RACES = "a product under way|another warp read since|nothing was written to|before the copy into it"
TOLD = "            mbarrier.arrive(written.index(here), count=1)\n"
FAULTS = {
    "weights overwritten": (
        "mbarrier.wait(w2_empty.index(slot), phase)", "pass",
        RACES + "|more threads arrive",
    ),
    "weights of the second product released while it runs": (
        "mbarrier.arrive(w3_empty.index(before), count=1, pred=block > 0)",
        "mbarrier.arrive(w3_empty.index(slot), count=1)", RACES + "|mbarrier",
    ),
    "taps overwritten": (
        "    mbarrier.wait(x_empty.index(x_slot), x_phase)\n                    load_tap",
        "    load_tap",
        RACES + "|more threads arrive",
    ),
    "pixels of the product in front that are not all there": (
        "    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))\n    mbarrier",
        "    mbarrier", "is used before the product that writes it was waited for",
    ),
    "pixels released too early": ("pred=block == BLOCKS - 1", "pred=block == 0", RACES),
    "wrong parity of the weights": (
        "    phase = 0\n    x_slot", "    phase = 1\n    x_slot", RACES + "|mbarrier"
    ),
    "wrong parity of the pixels": ("x_phase = 0\n    place", "x_phase = 1\n    place", RACES),
    "wrong parity of the places": (
        "leaving // PLACES % 2", "(leaving // PLACES + 1) % 2", RACES + "|fence|mbarrier|copy"
    ),
    "one group asked": ("barriers(STAGES, 1, 2)", "barriers(STAGES, 1, 1)", RACES + "|mbarrier"),
    "a residual that is not waited for": (
        "            mbarrier.wait(ready.index(here), parity)\n            wide =",
        "            wide =", RACES + "|mbarrier",
    ),
    "a block that is multiplied before it is visible": (
        f"            fence_async_shared()\n{TOLD}            mbarrier.wait(w3_full",
        f"{TOLD}            mbarrier.wait(w3_full", "no fence.proxy.async made visible",
    ),
    "a place taken before it has left": (
        "                tma.store_wait(pendings=2)\n", "", "a product under way reads, or a copy"
    ),
    "a place taken before it is multiplied": (
        "leaving = item - (PLACES - 1)", "leaving = item - PLACES", RACES + "|mbarrier|copy"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", usual(FAULTS))
def test_planted_faults_are_refused_by_the_emulator(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, replacement, message = FAULTS[fault]
    module = planted(chain, text, replacement, tmp_path, monkeypatch)
    asked = problem((16, 8), (64, 256, 64), 4)
    tile = tile_of(asked, 1, 2, 2)
    if "front" in fault or "taps" in fault:
        asked = problem((8, 16), (64, 192, 64), 3, front=SAME)
        tile = tile_of(asked, 2, 2, 2, box=(1, 8, 16))
    with pytest.raises(FaultError, match=message):
        check(asked, tile, 1, kernel=module.chain_kernel)


# What it compiles to.

COMPILED = {
    f"{narrow} channels": problem((28, 28), (narrow, 4 * narrow, narrow), 256)
    for narrow in (64, 128, 256)
}
COMPILED["gelu"] = problem(
    (28, 28), (128, 512, 256), 256, (*ADDED, Stage("gelu")), last=(Stage("add"), Stage("gelu"))
)


@pytest.mark.parametrize("name", COMPILED)
def test_chains_are_compiled_without_spills(name: str) -> None:
    """Nothing but both products, and little beside them, in a block's loop."""
    asked = COMPILED[name]
    (tile,) = hopper.tiles(asked, SM_90)
    (launch,) = CHAIN.launches(asked, tile, SM_90)
    (wanted,) = rank.requests(CHAIN, asked, (launch,), SM_90)
    found = offline.report(wanted)
    assert found.spill_bytes == 0 and found.registers == 168, found
    assert found.shared_bytes <= hopper.shared_bytes(asked, tile)
    assert found.count("UTMALDG") >= 4 and found.count("UTMASTG") and found.count("STSM")
    assert not found.count("STG") and not found.count("LDGSTS")
    loop = machine_code.hot_loop(offline.disassembly(offline.compile_request(wanted)))
    c, narrow = (max(64, each.shape[1]) for each in (asked.inputs[0], asked.outputs[1]))
    assert loop is not None
    assert loop.count("HGMMA.64x64x16") == c // 16 + 4 * (narrow == 64)
    assert narrow == 64 or loop.count(f"HGMMA.64x{narrow}x16") == 4
    assert loop.count("WARPGROUP.DEPBAR") == 1
    if name != "gelu":
        results = sum(core.END_INSTRUCTIONS) * 64 * hopper.BLOCK / 128
        beside = len(loop.opcodes) - loop.count("HGMMA") - results
        assert 0.6 * hopper.BLOCK_INSTRUCTIONS < beside < 1.3 * hopper.BLOCK_INSTRUCTIONS


# Where it is chosen.


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLOOM_CORE", "hopper")


def test_nobody_gets_it_who_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = COMPILED["128 channels"]
    (tile,) = hopper.tiles(asked, SM_90)
    for setting, chosen, reason in (
        ("", False, None), ("hopper", True, None), ("plain", False, "CONVLOOM_CORE=plain switches"),
    ):  # fmt: skip
        monkeypatch.setenv("CONVLOOM_CORE", setting)
        assert core.uses_core(CHAIN.default(asked, SM_90)) is chosen
        assert (tile in CHAIN.configs(asked, SM_90)) is chosen
        found = CHAIN.legal(asked, tile, SM_90)
        assert found is None if reason is None else reason in str(found)
        assert CHAIN.crowded(asked, tile, SM_90) is None


def test_whoever_asks_gets_the_faster_by_the_model(asked_for: None) -> None:
    """Plain tiles for few pixels, and for so few channels that both wait for memory."""
    for name, asked in COMPILED.items():
        (tile,) = hopper.tiles(asked, SM_90)
        chosen = CHAIN.default(asked, SM_90)
        assert (chosen == tile) is (name != "64 channels")
        times = [
            cost_model.problem_us(CHAIN, asked, SM_90, each)
            for each in (chosen, *CHAIN.configs(asked, SM_90))
        ]
        assert times[0] < 1.02 * min(times)
    few = problem((7, 7), (128, 512, 128), 1)
    note = core.note(few, CHAIN.default(few, SM_90), SM_90, ())
    assert note == "plain core: it is ranked before the Hopper core"
    asked = COMPILED["128 channels"]
    assert core.note(asked, CHAIN.default(asked, SM_90), SM_90, ()) == "Hopper core"


def test_what_it_cannot_compute_is_refused_with_a_reason(asked_for: None) -> None:
    good = problem((16, 16), (64, 256, 64), 8, front=SAME)
    tile = tile_of(good, 2, 2, 2, box=(1, 8, 16))
    chained = good.attributes.expect(ConvChain)
    single = harness.problem_for(
        CHAIN, chained, tuple(each.spec.with_(dtype=SINGLE) for each in good.inputs)
    )
    grouped = problem((16, 16), (64, 256, 64), 8, front=replace(SAME, groups=2), filters=(32, 3, 3))
    uneven = problem((16, 16), (64, 256, 64), 8, front=HALVED, filters=(72, 3, 3))
    for asked, config_, target, reason in (
        (good, tile, parse("cuda:sm_80"), "made for sm_90, not for cuda:sm_80"),
        (without_reduction(good), tile, SM_90, "has no chain without a reduction"),
        (beside_a_shortcut(), tile, SM_90, "has no chain beside a shortcut"),
        (single, tile, SM_90, "chains products of fp16 and bf16, not torch.float32"),
        (grouped, tile, SM_90, "2 groups"),
        (uneven, tile, SM_90, "72 channels are not a multiple of 64"),
        (problem((8, 8), (264, 256, 64)), tile, SM_90, "264 to 256 to 64 channels; the Hopper"),
        (problem((8, 8), (64, 256, 24)), tile, SM_90, "64 to 256 to 24 channels; the Hopper core"),
        (problem((8, 8), (68, 256, 64)), tile, SM_90, "the pitch of x, 136 bytes"),
        (problem((8, 8), (64, 260, 64)), tile, SM_90, "TMA: y cannot be moved in boxes"),
        (moved(good, z={"pitch": 68}), tile, SM_90, "TMA: z cannot be moved in boxes"),
        (good, replace(tile, num_warps=8), SM_90, "has no tile of"),
        (good, replace(tile, num_stages=16), SM_90, "bytes of shared memory"),
        (good, tile_with(tile, BOX_W=8), SM_90, "has no tile of"),
        (good, tile_with(tile, PLACES=1), SM_90, "has no tile of"),
        (good, tile_with(tile, SLOTS=1), SM_90, "has no tile of"),
    ):
        assert reason in str(CHAIN.legal(asked, config_, target)), reason
    for asked, note in (
        (without_reduction(good), "the Hopper core has no chain without a reduction"),
        (problem((8, 8), (72, 136, 72)), "with channels filled up a chain has 2.5 times the produ"),
        (problem((28, 28), (256, 1024, 256), front=SAME, filters=(256, 3, 3)), "no tile of the H"),
    ):
        chosen = CHAIN.default(asked, SM_90)
        assert core.note(asked, chosen, SM_90, ()).startswith(f"plain core: {note}")


def without_reduction(asked: Problem) -> Problem:
    """A chain without its reduction."""
    attributes = replace(asked.attributes.expect(ConvChain), has_reduce=False, after_reduce=())
    specs = tuple(each.spec for each in asked.inputs)
    return harness.problem_for(CHAIN, attributes, specs[: links.slots(attributes.links).count])


def beside_a_shortcut() -> Problem:
    """A chain that adds the product of another image."""
    asked = problem((16, 16), (64, 256, 64), 8, BIAS, "b")
    x, w2, *others = (each.spec for each in asked.inputs)
    attributes = replace(asked.attributes.expect(ConvChain), shortcut=Conv2d())
    return harness.problem_for(CHAIN, attributes, (x, w2, x, w2, *others))


def tile_with(tile: Config, **sizes: int) -> Config:
    return replace(tile, blocks=tuple({**dict(tile.blocks), **sizes}.items()))


def test_weights_of_few_channels_are_read_once(asked_for: None) -> None:
    """Of as many blocks as there are slots for; the model knows that a program reads them once."""
    bytes_read = {}
    for name in ("64 channels", "128 channels"):
        asked = COMPILED[name]
        (tile,) = hopper.tiles(asked, SM_90)
        (launch,) = CHAIN.launches(asked, tile, SM_90)
        c, wide = asked.inputs[0].shape[1], asked.output.shape[1]
        pixels = 2 * hopper.PIXELS * (c + wide)
        bytes_read[name] = (launch.l2_bytes - pixels, 2 * wide * 2 * c)
    assert bytes_read["64 channels"][0] == 0
    assert bytes_read["128 channels"][0] == bytes_read["128 channels"][1]


@pytest.mark.parametrize(
    ("channels", "front", "slots", "shared"),
    [
        ((64, 256, 64), None, (2, 4, 3), 148_480),
        ((64, 256, 64), SAME, (4, 4, 3), 230_400),
        ((128, 512, 128), None, (1, 4, 3), 214_016),
        ((128, 512, 128), SAME, (3, 2, 2), 230_400),
        ((256, 1024, 256), None, (1, 2, 2), 230_400),
    ],
)
def test_what_there_is_room_for(
    channels: tuple[int, int, int], front: Conv2d | None, slots: tuple[int, ...], shared: int
) -> None:
    """As `docs/how/kernels.md` says."""
    asked = problem((28, 28), channels, 256, front=front, filters=(channels[0], 3, 3))
    tile = next(hopper.tiles(asked, SM_90))
    assert (tile["SLOTS"], tile.num_stages, tile["PLACES"]) == slots
    assert hopper.shared_bytes(asked, tile) == shared


class Bottlenecks(nn.Module):
    """Two blocks of ResNet-50, and the reduction behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(*channels, size, padding=size // 2)
            for channels, size in (
                ((256, 64), 1), ((64, 64), 3), ((64, 256), 1), ((256, 64), 1), ((64, 64), 3),
                ((64, 256), 1),
            )
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first in (0, 3):
            t = torch.relu(self.layers[first](x))
            t = torch.relu(self.layers[first + 1](t))
            x = torch.relu(self.layers[first + 2](t) + x)
        return x


def test_a_network_of_bottlenecks_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLOOM_CORE", "hopper")
    monkeypatch.setattr(core, "faster", lambda *given: (given[3] or [given[2]])[0])
    net, x = Bottlenecks().eval(), torch.randn(2, 256, 16, 16)
    made = convloom.compile(
        net, (x,), target="emulator:sm_90", dtype=HALF, tuning="heuristic",
        force=["rotated-bottleneck"],
    )  # fmt: skip
    chains = [step for step in made.plan.steps if step.op == "conv_chain"]
    by_core = [step.problem.attributes.front for step in chains if core.uses_core(step.config)]
    assert len(chains) > len(by_core) == 1 and by_core != [None], made.plan.to_text()
    assert "without a reduction" in made.plan.to_text()
    exact, found = net.double()(x.double()), made(x).double()
    assert (found - exact).norm() < 0.01 * exact.norm()
