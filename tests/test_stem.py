"""The boundary: first convolutions that read the user's image as it lies, or after one input
kernel that pads it. What the generic tests of ops and passes do not cover: dtypes that differ,
filter rows beside values that are not finite, which convolutions the pass takes and why not others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import Graph
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import PASSES, run_passes
from convloom.compiler.passes.fusions.stem import CHANNELS, LABELS, fuse_stem, padded_width
from convloom.compiler.run.executable import Executable
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import targets, tolerance
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Attributes, Problem, Ref
from convloom.kernels.contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from convloom.kernels.devices import offline
from convloom.kernels.fused import stem
from convloom.kernels.fused.stem import Stem
from convloom.kernels.fused.stem_input import StemInput
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import nn

from . import harness, nets
from .nets import Made

HALF = torch.float16
FORMS = tuple(LABELS.values())
RULES = {label: rule for rule, label in LABELS.items()}
MEAN, SCALE = (0.485, 0.456, 0.406), (4.367, 4.464, 4.444)
SHAPE = (2, 3, 13, 18)


@pytest.fixture(scope="module", autouse=True)
def exporting_once() -> Iterator[None]:
    with nets.exporting_once():
        yield


# ------------------------------------------------------------------------------- the kernels


@pytest.mark.interpreter
@pytest.mark.parametrize("compute", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("entering", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [False, True])
def test_images_of_any_dtype_enter_any_computation(
    entering: torch.dtype, compute: torch.dtype, normalise: bool
) -> None:
    """The image is cast once, after the normalisation, which is computed in fp32."""
    mean, scale = (MEAN, SCALE) if normalise else ((), ())
    conv = Conv2d((2, 1), (1, 0, 2, 1))
    x = TensorSpec((2, 3, 9, 20), entering)
    w = TensorSpec((10, 3, 3, 4), compute)
    image = harness.make_tensor(x, 3, 0.0, 1.0)
    filters = harness.make_tensor(w, 4, -1.0, 1.0)
    wide = image.float()
    if normalise:
        wide = (wide - torch.tensor(MEAN)[:, None, None]) * torch.tensor(SCALE)[:, None, None]
    rounded = wide.to(compute)
    op = registry.get("stem")
    problem = harness.problem_for(op, Stem(conv, mean, scale), (x, w), pad=3)
    (result,) = harness.run_interpreted(op, problem, (image, filters))
    exact = stem.reference(Stem(conv), rounded.double(), filters.double())
    peer = stem.reference(Stem(conv), rounded, filters)
    assert tolerance.compare(result, exact, peer, depth=36) is None

    op = registry.get("stem_input")
    attributes = StemInput(compute, 4, 2, 24, mean, scale)
    problem = harness.problem_for(op, attributes, (x,), pad=3)
    (padded,) = harness.run_interpreted(op, problem, (image,))
    assert padded.dtype is compute and padded.shape == (2, 4, 9, 24)
    torch.testing.assert_close(padded[:, :3, :, 2:22].float(), rounded.float(), rtol=1e-2, atol=0)
    padded[:, :3, :, 2:22] = 0.0
    assert not padded.any(), "the border and the last channel are zero after the normalisation"


@pytest.mark.interpreter
@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("filters", [(7, 7), (3, 3), (1, 6), (2, 11)])
def test_a_filter_row_does_not_see_the_pixel_beside_it(
    channels: int, filters: tuple[int, int]
) -> None:
    """Runs are padded with zeros: 0 · inf of a neighbour must not become NaN."""
    op = registry.get("conv2d")
    conv = Conv2d((1, 2), (1, 1, 0, 0))
    x = TensorSpec((1, channels, 6, 31), torch.float32, Layout.NHWC)
    w = TensorSpec((5, channels, *filters), torch.float32)
    problem = harness.problem_for(op, conv, (x, w))
    assert problem.output.shape[3] > 4
    image = harness.make_tensor(x, 0, -1.0, 1.0)
    # Column 2·q + S is the first that output q does not read.
    image[0, :, 2, filters[1]] = float("inf")
    image[0, :, 3, 2 + filters[1]] = float("nan")
    weight = harness.make_tensor(w, 1, 0.5, 1.0)
    for target in (targets.INTERPRETER, *targets.GPU_TARGETS):
        harness.check(op, problem, (image, weight), tile=op.default(problem, target))


def test_messages_of_impossible_stems() -> None:
    x = TensorSpec((1, 3, 8, 8), torch.float32)
    w = TensorSpec((8, 3, 3, 3), torch.float32)
    refused: tuple[tuple[str, Attributes, tuple[TensorSpec, ...], str], ...] = (
        ("stem", Stem(mean=(1.0,), scale=(1.0,)), (x, w), "each of the 3 channels"),
        ("stem", Stem(mean=MEAN), (x, w), "got 3 means and 0 scales"),
        ("stem", Stem(mean=MEAN, scale=(1.0, float("inf"), 1.0)), (x, w), "must be finite"),
        ("stem", Stem(Conv2d(groups=3)), (x, w.with_(shape=(9, 1, 3, 3))), "expected 1 group"),
        ("stem", Stem(), (x, w.with_(shape=(8, 2, 3, 3))), "do not divide into"),
        ("stem_input", StemInput(), (w.with_(shape=(8, 3)),), "expected an image"),
        ("stem_input", StemInput(channels=2, width=8), (x,), "a power of two of at least 3"),
        ("stem_input", StemInput(channels=6, width=8), (x,), "a power of two of at least 3"),
        ("stem_input", StemInput(left=4, width=4), (x,), "4 columns hold nothing"),
    )
    for op, attributes, specs, message in refused:
        with pytest.raises(InvalidInputError, match=message):
            registry.get(op).infer(attributes, specs)


# ---------------------------------------------------------------------------- compiled stems


def first_problems(form: str, conv: tuple[int, int, int, int, int, int]) -> list[Problem]:
    """An fp32 image into a half-precision convolution with bias and ReLU, at batch 32.

    conv: input and output channels, side of the image, filter, stride and padding.
    """
    c, k, side, r, stride, pad = conv
    x = TensorSpec((32, c, side, side), torch.float32)
    bias = (TensorSpec((k, 1, 1), torch.float32),)
    stages = (Stage("add"), Stage("relu"))
    attributes = Conv2d((stride, stride), (pad,) * 4)
    w = TensorSpec((k, c, r, r), HALF)
    if form == "stem-loads":
        op = registry.get("stem")
        return [harness.problem_for(op, Stem(attributes, MEAN, SCALE), (x, w), stages, bias)]
    q = (side + 2 * pad - r) // stride + 1
    width = padded_width(attributes, w, q)
    first = StemInput(HALF, CHANNELS, pad, width, MEAN, SCALE)
    padded = harness.problem_for(registry.get("stem_input"), first, (x,))
    w = w.with_(shape=(k, CHANNELS, r, r))
    then = Conv2d((stride, stride), (pad, pad, 0, 0))
    product = harness.problem_for(
        registry.get("conv2d"), then, (padded.output.spec, w), stages, bias
    )
    assert product.output.shape == (32, k, q, q)
    return [padded, product]


STEMS = {
    "vgg": ("stem-loads", (3, 64, 224, 3, 1, 1)),
    "mobilenet": ("stem-loads", (3, 32, 224, 3, 2, 1)),
    "resnet": ("stem-loads", (3, 64, 224, 7, 2, 3)),
    "resnet in rows": ("stem-rows", (3, 64, 224, 7, 2, 3)),
    "alexnet in rows": ("stem-rows", (3, 96, 227, 11, 4, 0)),
}

QUICK = ("vgg", "resnet in rows")
"""One of each form, for every capability."""


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, at, marks=() if at == 90 or name in QUICK else pytest.mark.slow)
        for name in STEMS
        for at in (80, 90, 100)
    ],
)
def test_stems_compile_to_coalesced_loads_without_spills(name: str, capability: int) -> None:
    """Neither do the accumulators of an unrolled product exceed sm_100's tensor memory: Triton then
    emits an empty kernel."""
    form, geometry = STEMS[name]
    target = targets.parse(f"cuda:sm_{capability}")
    for problem in first_problems(form, geometry):
        op = registry.get(problem.op)
        groups = {"input": problem.inputs, "output": problem.outputs, "operand": problem.operands}

        def dtype_of(ref: Ref, groups: dict[str, Any] = groups) -> torch.dtype:
            dtype: torch.dtype = groups[ref.kind][ref.index].spec.dtype
            return dtype

        (launch,) = op.launches(problem, op.default(problem, target), target)
        wanted = offline.request(launch, dtype_of, target)
        report = offline.report(wanted)
        assert report.spill_bytes == 0 and report.shared_bytes <= target.shared_bytes
        assert sum(report.instructions.values()) > 100, "an empty kernel"
        assert not report.count("LDG.U16") and not report.count("LDGSTS.32")
        if problem.op == "stem":
            # One load for each term of a sum: nothing is loaded by two threads, or past the filter.
            assert report.count("LDG.32") == stem.terms(problem.inputs[1].spec)
        if problem.op == "conv2d":
            assert report.count("LDGSTS.128")


# ---------------------------------------------------------------------------------- the pass

STANDING = {"stem-loads": ["stem"], "stem-rows": ["stem_input", "conv2d"]}


class Numbers(nn.Module):
    """A mean and a standard deviation per channel; more numbers for what is refused."""

    mean: torch.Tensor
    std: torch.Tensor
    pixels: torch.Tensor
    zero: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))
        self.register_buffer("pixels", torch.linspace(1.0, 2.0, SHAPE[2]).reshape(-1, 1))
        self.register_buffer("zero", torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1))


Body = Callable[[Any, torch.Tensor], Any]


def made_of(function: Body, shape: tuple[int, ...] = SHAPE, **conv: Any) -> Made:
    """A network with a convolution and constants, and a seeded image between 0 and 1."""
    options = {"kernel_size": 3, "stride": 2, "padding": 1, "out_channels": 8, **conv}
    options.setdefault("in_channels", shape[1])
    layer = nets.randomise(nn.Conv2d(**options))
    module = nets.Net(function, conv=layer, numbers=Numbers()).eval()
    return module, tuple(x.sigmoid() for x in nets.inputs_of(shape))


def plain(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(m.conv(x))


def normalised(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(m.conv((x - m.numbers.mean) / m.numbers.std))


def other_way_round(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The same stages as reversed ones, through literals and a negation."""
    return m.conv(-(m.numbers.mean - x * 255.0 / 255.0) * 2.0 + 1.0)


def steps(exe: Executable) -> list[str]:
    return [step.op for step in exe.plan.steps]


def reasons(exe: Executable, form: str) -> list[str]:
    refused = (event for event in exe.ledger.events if not event.accepted)
    return [event.reason for event in refused if event.rule == RULES[form]]


def compiled(made: Made, form: str, **options: Any) -> Executable:
    """For the interpreter, with the boundary in the given form."""
    settings = {"target": "interpreter", "force": (form,), **options}
    return convloom.compile(made[0], made[1], **settings)


def laid_out(made: Made) -> Graph:
    """The graph as the pass finds it."""
    names = tuple(step.name for step in PASSES if step.run is not fuse_stem)
    return run_passes(nets.captured(*made), Ledger(), names)


@pytest.mark.parametrize("body", [plain, normalised, other_way_round])
def test_the_meaning_is_kept_and_nothing_is_done_twice(body: Body) -> None:
    made = made_of(body)
    graph = laid_out(made)
    ledger = Ledger()
    after = fuse_stem(graph.copy(), ledger)
    verify(after)
    nets.assert_same_meaning(graph, after, made[1])
    assert [node.op for node in after.compute_nodes()] == ["stem", "relayout"]
    accepted = [event for event in ledger.events if event.accepted]
    assert [event.rule for event in accepted] == [RULES["stem-loads"]]
    assert accepted[0].bytes_saved >= 2 * graph.graph_inputs()[0].spec.size_bytes
    assert text.to_text(fuse_stem(after.copy(), Ledger())) == text.to_text(after)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [None, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("body", [plain, normalised, other_way_round])
def test_both_forms_compute_what_the_module_does(
    body: Body, form: str, dtype: torch.dtype | None
) -> None:
    made = made_of(body)
    exe = compiled(made, form, dtype=dtype)
    assert steps(exe)[:-1] == STANDING[form]
    # A user's tensor may lie anywhere: here channels last, and every second column of a wider one.
    (x,) = made[1]
    wide = torch.zeros(2, 13, 36, 3).permute(0, 3, 1, 2)
    wide[..., ::2] = x
    result = exe(wide[..., ::2])
    assert torch.equal(result, exe(x))
    nets.check(result, *made, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [None, HALF], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("body", [plain, normalised])
def test_what_is_not_finite_stays_where_it_is(
    body: Body, form: str, dtype: torch.dtype | None
) -> None:
    """NaN and infinities at the corners, at the borders and inside reach the outputs whose filter
    covers them, and no others: as without the pass, and as in PyTorch."""
    module, (x,) = made_of(body)
    places = ((0, 0), (0, 17), (12, 0), (12, 17), (0, 8), (6, 0), (6, 9), (7, 14))
    for at, (row, column) in enumerate(places):
        special = (float("nan"), float("inf"), float("-inf"))[at % 3]
        x[at % 2, at % 3, row, column] = special
    made = module, (x,)
    result = compiled(made, form, dtype=dtype)(x)
    assert 0 < result.isnan().sum() < result.numel() // 2
    nets.check(result, *made, dtype)
    untouched = convloom.compile(module, (x,), target="interpreter", dtype=dtype, passes="none")
    assert torch.equal(result.isfinite(), untouched(x).isfinite())


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
def test_every_batch_is_served(form: str) -> None:
    module, (x,) = made_of(normalised, (4, *SHAPE[1:]))
    exe = compiled((module, (x,)), form, dynamic_batch=(1, 4))
    for batch in (4, 1, 3):
        nets.check(exe(x[:batch]), module, (x[:batch],))


@pytest.mark.interpreter
def test_a_normalisation_sunk_into_a_convolution_of_one_pixel_is_taken_along() -> None:
    made = made_of(normalised, kernel_size=1, stride=1, padding=1)
    exe = compiled(made, "stem-loads")
    assert steps(exe)[0] == "stem" and len(steps(exe)) == 2
    nets.check(exe(*made[1]), *made)


@pytest.mark.interpreter
def test_one_weight_in_two_orders() -> None:
    """With padding at the sides a weight is read by taps, without it in rows."""

    def body(m: Any, x: torch.Tensor) -> Any:
        y = F.conv2d(torch.tanh(x), m.conv.weight, m.conv.bias, 2, (1, 0))
        return m.conv(torch.relu(x)), y

    made = made_of(body, (2, 4, 9, 12))
    exe = convloom.compile(*made, target="interpreter")
    packed = [name for name in exe.plan.constants if "conv2d1" in name]
    assert len(packed) == 2
    nets.check(exe(*made[1]), *made)


def shared(m: Any, x: torch.Tensor) -> Any:
    return m.conv(x), x.half().float().square().sum((2, 3)), F.max_pool2d(x, 2)


def read_by_its_own_epilogue(m: Any, x: torch.Tensor) -> Any:
    return m.conv(x) * x


def shared_normalisation(m: Any, x: torch.Tensor) -> Any:
    y = x - m.numbers.mean
    return m.conv(y), y


REFUSED: dict[str, tuple[Body, dict[str, Any], tuple[int, ...], str, tuple[str, ...]]] = {
    "read by others": (shared, {}, SHAPE, "is also read by max_pool2d", FORMS),
    "read by itself": (
        read_by_its_own_epilogue, {"out_channels": 3, "kernel_size": 1, "stride": 1, "padding": 0},
        SHAPE, "is also read by conv", FORMS,
    ),
    "returned": (shared_normalisation, {}, SHAPE, "is also read by relayout", FORMS),
    "many channels": (plain, {}, (2, 6, 7, 5), "not an image of at most 4 channels", FORMS),
    "groups": (plain, {"groups": 3, "out_channels": 9}, SHAPE, "is grouped", FORMS),
    "not affine": (
        lambda m, x: m.conv(torch.relu(x)), {}, SHAPE, "not an addition or multiplication", FORMS,
    ),
    "reciprocal": (
        lambda m, x: m.conv(1.0 / (x + 1.0)), {}, SHAPE, "not an addition or multiplication", FORMS,
    ),
    "per pixel": (
        lambda m, x: m.conv(x * m.numbers.pixels), {}, SHAPE, "not one number per channel", FORMS,
    ),
    "times zero": (
        lambda m, x: m.conv(x * m.numbers.zero), {}, SHAPE, "multiplies a channel by zero", FORMS,
    ),
    "grey": (
        lambda m, x: m.conv(x - m.numbers.mean), {"in_channels": 3}, (2, 1, 9, 8), "broadcasts",
        FORMS,
    ),
    "rounded": (
        lambda m, x: m.conv(x.half().to(m.conv.weight.dtype)), {}, SHAPE,
        "rounds to torch.float16", FORMS,
    ),
    "many terms": (plain, {"kernel_size": 11, "padding": 5}, SHAPE, "363 terms", FORMS[:1]),
    "one channel": (plain, {}, (2, 1, 9, 8), "3 of 4 channels would be zeros", FORMS[1:]),
    "one pixel": (
        plain, {"kernel_size": (3, 1)}, SHAPE, "do not lie side by side", FORMS[1:],
    ),
    "dilated": (plain, {"dilation": (1, 2)}, SHAPE, "do not lie side by side", FORMS[1:]),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why_and_compute_the_same(name: str) -> None:
    body, options, shape, reason, forms = REFUSED[name]
    made = made_of(body, shape, **options)
    exe = convloom.compile(*made, target="interpreter")
    for form in forms:
        assert any(reason in given for given in reasons(exe, form)), reasons(exe, form)
    if forms == FORMS:
        assert "stem" not in steps(exe) and "stem_input" not in steps(exe)
    nets.check(exe(*made[1]), *made)
    with pytest.raises(InvalidInputError, match=f"force='{forms[0]}': cannot be fused"):
        compiled(made, forms[0])


def test_rows_of_odd_strides_are_refused_where_they_are_not_aligned() -> None:
    made = made_of(plain, stride=1)
    half = convloom.compile(*made, target="interpreter", dtype=HALF)
    assert reasons(half, "stem-rows") == [
        "with stride 1 filter rows do not start at multiples of 128 bits"
    ]
    assert steps(compiled(made, "stem-rows"))[0] == "stem_input", "fp32 pixels are 128 bits"


@pytest.mark.parametrize(("channels", "copies"), [(3, 1), (1, 0)])
def test_the_traffic_that_a_stem_saves(channels: int, copies: int) -> None:
    """Of the copy to channels innermost, written and read; one channel is not copied."""
    made = made_of(plain, (2, channels, 16, 12))
    exe = compiled(made, "stem-loads")
    accepted = (event for event in exe.ledger.events if event.accepted)
    (event,) = (event for event in accepted if event.rule == RULES["stem-loads"])
    assert event.bytes_saved == copies * 2 * made[1][0].nbytes


def test_what_is_computed_first_is_no_stem() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        return m.conv(F.max_pool2d(x, 2)), m.conv(x * x.mean((2, 3))[..., None, None])

    made = made_of(body)
    exe = convloom.compile(*made, target="interpreter")
    assert not reasons(exe, "stem-loads") and not reasons(exe, "stem-rows")


def test_wishes_are_followed() -> None:
    made = made_of(normalised)
    for form, other in (FORMS, FORMS[::-1]):
        forced = compiled(made, form)
        assert steps(forced)[:-1] == STANDING[form]
        assert reasons(forced, other) == [f"{form} is forced"]
        forbidden = convloom.compile(*made, target="interpreter", forbid=(other,))
        assert reasons(forbidden, other) == [f"forbidden by forbid={other!r}"]
    neither = convloom.compile(*made, target="interpreter", forbid=FORMS)
    assert steps(neither)[:2] == ["relayout", "sub"]


@pytest.mark.parametrize(
    ("conv", "taken"),
    [
        ({"kernel_size": 7, "padding": 3, "out_channels": 64}, "stem-loads"),
        ({"kernel_size": 11, "stride": 4, "out_channels": 64}, "stem-rows"),
    ],
)
def test_on_a_gpu_the_least_modelled_time_wins(conv: dict[str, Any], taken: str) -> None:
    made = made_of(plain, (32, 3, 224, 224), **conv)
    exe = convloom.compile(*made, target="cuda:sm_90", dtype=HALF)
    assert steps(exe)[:-1] == STANDING[taken]
    accepted = [event.rule for event in exe.ledger.events if event.accepted]
    assert RULES[taken] in accepted
    if taken == "stem-loads":
        (reason,) = reasons(exe, "stem-rows")
        assert "modelled " in reason and "stem-loads" in reason and "sm_90" in reason
