"""Convolutions in one, two and three dimensions, transposed ones, borders, and pooling of sequences
and volumes: what the generic tests of ops and rules do not ask."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.graph.ir import Value
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes.squeezes import sink_squeezes
from convloom.errors import CaptureError, InvalidInputError, UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.convolution.conv_nd import BorderConv2d, Conv3d
from convloom.kernels.convolution.conv_phases import Axis, ConvTranspose2d, ConvTranspose3d
from convloom.kernels.movement.pad import Pad
from convloom.kernels.pooling.pool_window import AdaptivePool3d, AvgPool3d, MaxPool3d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from . import nets

SEQUENCE, IMAGE, VOLUME = (2, 6, 19), (2, 6, 9, 7), (2, 4, 5, 6, 7)
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def through(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Layers one after the other."""
    return lambda: nn.Sequential(*layers)


def compiled(make: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> Any:
    """A network compiled for the interpreter, after its results were found right."""
    module, inputs = nets.randomise(make()), nets.inputs_of(shape)
    exe = convloom.compile(module, inputs, target="interpreter", **options)
    assert exe.summary["torch_fallbacks"] == 0
    nets.check(exe(*inputs), module, inputs, options.get("dtype"))
    return exe


def ops(exe: Any) -> list[str]:
    """The ops of the steps, without the conversions at the boundary."""
    return [step.op for step in exe.plan.steps if step.op not in ("relayout", "reshape")]


# Geometries that are conv2d's.


SEPARABLE = {
    "column then row": through(
        nn.Conv2d(6, 8, (5, 1), padding=(2, 0)), nn.Conv2d(8, 8, (1, 5), padding=(0, 2))
    ),
    "flattened": through(
        nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=8),
    ),
    "depthwise separable": through(
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 9, 1)
    ),
    "same, even filter": through(nn.Conv2d(6, 8, 4, padding="same"), nn.ReLU()),
    "valid": through(nn.Conv2d(6, 8, (2, 3), padding="valid", dilation=2)),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_convolutions(name: str) -> None:
    compiled(SEPARABLE[name], IMAGE)


# Sequences.


@pytest.mark.interpreter
def test_a_chain_of_1d_layers_is_transposed_at_its_ends_only() -> None:
    exe = compiled(
        through(
            nn.Conv1d(6, 16, 3, padding=1), nn.ReLU(),
            nn.Conv1d(16, 16, 5, stride=2, padding=2), nn.BatchNorm1d(16), nn.ReLU(),
            nn.ConvTranspose1d(16, 8, 4, 2, 1), nn.ReLU(),
            nn.Conv1d(8, 8, 3, padding="same", dilation=2), nn.Tanh(),
        ),
        SEQUENCE,
    )  # fmt: skip
    assert ops(exe) == ["conv2d", "conv2d", "conv_transpose2d", "conv2d"]
    assert sum(step.op == "relayout" for step in exe.plan.steps) == 2


@pytest.mark.interpreter
def test_1d_pooling_joins_the_chain() -> None:
    exe = compiled(
        through(
            nn.Conv1d(6, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool1d(3, 2, 1),
            nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.AvgPool1d(2),
        ),
        (3, 6, 33),
    )  # fmt: skip
    assert sum(step.op == "relayout" for step in exe.plan.steps) == 2


class Residual(nn.Module):
    """A residual block over sequences with a gate per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
        self.gate, self.head = nn.Conv1d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.b(torch.relu(self.a(x)))
        y = y * torch.sigmoid(self.gate(y.mean(-1, keepdim=True)))
        return self.head(torch.relu(y + x).mean(2))


@pytest.mark.interpreter
def test_residuals_gates_and_heads_of_sequences() -> None:
    exe = compiled(Residual, SEQUENCE)
    assert "relu" not in ops(exe), "the activation stayed outside its convolution"


@pytest.mark.interpreter
def test_a_squeeze_that_others_read_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(6, 8, 3), nn.Conv1d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            return self.b(torch.relu(y)), y.transpose(1, 2)

    compiled(Both, SEQUENCE)


def test_squeezes_that_have_sunk_are_gone() -> None:
    module = nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU()).eval()
    graph = sink_squeezes(nets.captured(module, nets.inputs_of(SEQUENCE)), Ledger())
    reachable = graph.nodes_reachable_from_inputs()
    nodes = [node for node in graph.compute_nodes() if node.name in reachable]
    assert [node.op for node in nodes].count("reshape") == 2
    assert all(graph.uses(Value(node.name)) for node in nodes)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (through(nn.Conv1d(6, 8, 3, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 3)), (3, *SEQUENCE[1:])),
        (through(nn.Conv3d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)), (3, *VOLUME[1:])),
        (through(nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), nn.ReLU()), (3, *IMAGE[1:])),
    ],
    ids=["1d", "3d", "transposed"],
)
def test_any_batch_of_a_range(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module = nets.randomise(make())
    inputs = nets.inputs_of(shape)
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 3))
    for batch in (1, 2, 3):
        (x,) = nets.inputs_of((batch, *shape[1:]), seed=batch)
        nets.check(exe(x), module, (x,))


# Volumes.


@pytest.mark.interpreter
def test_volumes_are_channels_last_from_end_to_end() -> None:
    exe = compiled(
        through(
            nn.Conv3d(4, 8, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False), nn.BatchNorm3d(8),
            nn.ReLU(), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(8, 12, (1, 3, 3), padding="same"),
            nn.Conv3d(12, 8, (3, 1, 1), padding=(1, 0, 0), groups=4), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5),
        ),
        (2, 4, 5, 12, 12),
    )  # fmt: skip
    assert sum(step.op == "relayout" for step in exe.plan.steps) == 1
    assert ops(exe)[:4] == ["conv3d", "max_pool3d", "conv3d", "conv3d"]


@pytest.mark.interpreter
def test_a_flattened_volume_is_a_view() -> None:
    exe = compiled(
        through(nn.Conv3d(4, 8, 3), nn.AvgPool3d(2, ceil_mode=True), nn.Flatten(),
                nn.Linear(8 * 2 * 2 * 3, 5)),
        VOLUME,
    )  # fmt: skip
    assert ops(exe) == ["conv3d", "avg_pool3d", "linear"]


@pytest.mark.interpreter
def test_rank_5_tensors_that_are_no_volumes_stay_dense() -> None:
    """The groups of a channel shuffle must not pay for the layout of volumes."""

    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    exe = compiled(Shuffle, IMAGE)
    for step in exe.plan.steps:
        for operand in (*step.problem.inputs, *step.problem.outputs):
            assert operand.spec.rank != 5 or operand.spec.layout is Layout.DENSE


# Transposed convolutions.


UPSAMPLING = {
    "U-Net": (through(nn.ConvTranspose2d(6, 8, 2, 2), nn.ReLU()), IMAGE),
    "DCGAN": (
        through(nn.ConvTranspose2d(6, 8, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2, bias=False), nn.BatchNorm2d(8),
                nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()),
        (3, 6, 1, 1),
    ),
    "FCN": (through(nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6, bias=False)), IMAGE),
    "phases without taps": (through(nn.ConvTranspose2d(6, 8, 1, 3), nn.Sigmoid()), IMAGE),
    "dilated": (through(nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, dilation=2)), IMAGE),
    "3-d": (through(nn.ConvTranspose3d(4, 8, 3, 2, 1, 1), nn.BatchNorm3d(8), nn.ReLU()), VOLUME),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", UPSAMPLING)
def test_transposed_convolutions(name: str) -> None:
    """One kernel per layer: normalisation is folded, activations are epilogues."""
    make, shape = UPSAMPLING[name]
    layers = sum("ConvTranspose" in type(layer).__name__ for layer in make().children())
    assert len(ops(compiled(make, shape))) == layers


@given(
    size=st.integers(1, 6), taps=st.integers(1, 6), stride=st.integers(1, 5),
    padding=st.integers(0, 4), dilation=st.integers(1, 5), more=st.integers(0, 4),
)  # fmt: skip
def test_phases_cover_every_pair_of_input_and_tap_once(
    size: int, taps: int, stride: int, padding: int, dilation: int, more: int
) -> None:
    """The arithmetic of `first_tap` in whole numbers, against the definition."""
    outputs = (size - 1) * stride - 2 * padding + dilation * (taps - 1) + 1 + more
    if outputs < 1 or more >= max(stride, dilation):
        return
    axis = Axis.of(size, taps, outputs, stride, padding, dilation)
    wanted = {
        (i * stride - padding + r * dilation, i, r) for i in range(size) for r in range(taps)
    }
    found = []
    for phase in range(stride):
        shifted = phase + padding
        first = shifted // axis.shared * axis.inverse % axis.every
        solvable = shifted % axis.shared == 0 and first < taps
        count = -(-(taps - first) // axis.every) if solvable else 0
        assert count <= axis.most and axis.tap_count in (None, count)
        base = (shifted - first * dilation) // stride
        for j in range(-(-(outputs - phase) // stride)):
            for u in range(count):
                i = j + base - u * (dilation // axis.shared)
                inside = 0 <= i < size
                assert inside or axis.is_open
                if inside:
                    found.append((j * stride + phase, i, first + u * axis.every))
    assert len(found) == len(set(found))
    assert set(found) == {pair for pair in wanted if 0 <= pair[0] < outputs}


# Any convolution.


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution or transposed convolution in 1 to 3 dimensions, perhaps behind an asymmetric
    pad, and the shape of an input that it fits."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from((1, 1, 2, 3, 6)))
    per_group = draw(st.sampled_from((1, 2, 4)))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 4 if dims < 3 else 3), each(1, 3), each(1, 2)
    sizes = each(7, 9) if dims < 3 else each(5, 6)
    channels = 6, groups * per_group
    bias = draw(st.booleans())
    if draw(st.booleans()):
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        most = [max(pair) - 1 for pair in zip(stride, dilation, strict=True)]
        more = tuple(draw(st.integers(0, high)) for high in most)
        made = layer(*channels, kernel, stride, each(0, 1), more, groups, bias, dilation)
        return made, (2, 6, *sizes)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]  # type: ignore[assignment]
    padding: Any = draw(st.sampled_from(("valid", "same", "numbers")))
    if padding == "same":
        stride = (1,) * dims
    padding = each(0, 2) if padding == "numbers" else padding
    mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
    made = layer(*channels, kernel, stride, padding, dilation, groups, bias, mode)
    around = [draw(st.integers(0, 2)) for _ in range(2 * dims)]
    pad = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[dims - 1]
    front = pad(tuple(around), 0.0) if draw(st.booleans()) else nn.Identity()
    return nn.Sequential(front, made), (2, 6, *sizes)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(drawn=convolutions())
@settings(max_examples=12)
def test_any_convolution(drawn: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = drawn
    compiled(through(layer, nn.ReLU()), shape)


# Borders.


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_modes_need_no_kernel_of_their_own(dims: int, mode: str) -> None:
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    shape = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}[dims]
    conv = layer(shape[1], 8, 3, padding=2, padding_mode=mode)  # type: ignore[operator]
    assert "pad" not in ops(compiled(through(conv, nn.ReLU()), shape))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "layer",
    [nn.ReflectionPad1d(3), nn.CircularPad2d((1, 2, 3, 0)), nn.ReplicationPad3d(2),
     nn.ConstantPad3d((1, 2, -1, 0, 0, 1), 1.5), nn.ReflectionPad2d((-1, 2, 3, -2)),
     nn.CircularPad2d((-1, 2, 3, -2))],
    ids=str,
)  # fmt: skip
def test_pads_and_crops(layer: nn.Module) -> None:
    dims = int(type(layer).__name__[-2])
    compiled(through(layer), {1: SEQUENCE, 2: IMAGE, 3: VOLUME}[dims])


@pytest.mark.interpreter
def test_folding_a_pad_can_be_forbidden() -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")
    exe = compiled(through(conv), IMAGE, forbid=("border-into-conv",))
    assert ops(exe) == ["pad", "conv2d"]


# Half precision.


@pytest.mark.interpreter
@every_dtype
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (through(nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), nn.ReLU()), SEQUENCE),
        (through(nn.Conv3d(4, 8, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2)), VOLUME),
        (through(nn.ConvTranspose2d(6, 8, 4, 2, 1), nn.ReLU()), IMAGE),
    ],
    ids=["1d", "3d", "transposed"],
)
def test_half_precision(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    compiled(make, shape, dtype=dtype)


# Bad input.


def images(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32, Layout.NHWC)


def dense(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32)


X2, X3 = images(1, 8, 5, 5), images(1, 8, 3, 5, 5)
SIXES = (1, 1, 1, 1, 1, 1)
MESSAGES = (
    ("conv3d", Conv3d(), (X2, dense(8, 8, 3, 3)), "expected x (N,C,D,H,W) and w (K,C/G,T,R,S)"),
    ("conv3d", Conv3d(groups=3), (X3, dense(9, 2, 1, 1, 1)), "do not divide into 3 groups"),
    ("conv3d", Conv3d(stride=(0, 1, 1)), (X3, dense(8, 8, 1, 1, 1)), "must be positive"),
    ("conv3d", Conv3d(), (X3, dense(8, 8, 5, 3, 3)), "a filter of 5 pixels"),
    ("conv3d", Conv3d(padding=(-3, 0, 0, 0, 0, 0)), (X3, dense(8, 8, 1, 1, 1)), "does not fit"),
    (
        "border_conv2d",
        BorderConv2d(padding=(5, 0, 0, 0)),
        (X2, dense(8, 8, 3, 3)),
        "mode 'reflect' can add at most 4 to dimension 2",
    ),
    (
        "border_conv2d",
        BorderConv2d(padding=(-1, 0, 0, 0), border="circular"),
        (X2, dense(8, 8, 3, 3)),
        "a circular border cannot crop",
    ),
    ("conv_transpose2d", ConvTranspose2d(), (X3, dense(8, 8, 3, 3)), "expected x (N,C,H,W)"),
    ("conv_transpose2d", ConvTranspose2d(groups=3), (X2, dense(8, 2, 3, 3)), "into 3 groups"),
    (
        "conv_transpose2d",
        ConvTranspose2d((2, 2), output_padding=(2, 0)),
        (X2, dense(8, 8, 3, 3)),
        "must be smaller than stride",
    ),
    ("conv_transpose2d", ConvTranspose2d(padding=(-1, 0)), (X2, dense(8, 8, 3, 3)), "not negative"),
    (
        "conv_transpose3d",
        ConvTranspose3d(padding=(3, 0, 0)),
        (X3, dense(8, 8, 1, 1, 1)),
        "padding 3 leaves nothing of dimension 2",
    ),
    ("max_pool3d", MaxPool3d((2, 2, 2)), (X2,), "expected x (N,C,D,H,W)"),
    ("max_pool3d", MaxPool3d((4, 1, 1)), (X3,), "does not fit dimension 2"),
    ("avg_pool3d", AvgPool3d((5, 1, 1), padding=(1, 0, 0)), (X3,), "does not fit dimension 2"),
    ("avg_pool3d", AvgPool3d(divisor_override=0), (X3,), "must not be zero"),
    ("adaptive_avg_pool3d", AdaptivePool3d((0, 1, 1)), (X3,), "both need voxels"),
    ("pad", Pad((0, 0, 5, 0), (0, 0, 0, 0), mode="reflect"), (X2,), "at most 4 to dimension 2"),
    ("pad", Pad((0, 0, 6, 0), (0, 0, 0, 0), mode="circular"), (X2,), "at most 5 to dimension 2"),
    ("pad", Pad((1, 0, 0, 0), (0, 0, 0, 0), mode="replicate"), (X2,), "leaves the first 1 of 4"),
    ("pad", Pad((1,), (0,), mode="reflect"), (dense(4),), "needs two dimensions or more"),
    ("pad", Pad((0,), (0,), mode="mirror"), (dense(4),), "unknown mode 'mirror'"),
    ("pad", Pad((0, 0, -3, 0), (0, 0, -2, 0)), (X2,), "leaves nothing of"),
)


@pytest.mark.parametrize(("name", "attributes", "specs", "message"), MESSAGES)
def test_messages_of_impossible_geometry(
    name: str, attributes: Attributes, specs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        registry.get(name).infer(attributes, specs)
    assert str(raised.value).startswith(f"{name}: ")


TOO_LARGE = (
    (nn.Conv1d(6, 8, 30), SEQUENCE),
    (nn.Conv2d(6, 8, 12), IMAGE),
    (nn.Conv3d(4, 8, 9), VOLUME),
    (nn.ReflectionPad2d(9), IMAGE),
    (nn.MaxPool3d(9), VOLUME),
)


@pytest.mark.parametrize(("layer", "shape"), TOO_LARGE, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused_at_capture(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError, match=r"torch\.export could not capture Sequential"):
        convloom.compile(nn.Sequential(layer).eval(), nets.inputs_of(shape), target="reference")


@pytest.mark.parametrize("check", ["0", "2"])
def test_output_padding_that_does_not_fit_is_refused(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta function of transposed convolution does not look before torch 2.15; eager torch
    raises. A check that cannot evaluate the call does not hide the refusal."""
    monkeypatch.setenv("CONVLOOM_CHECK", check)
    module = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=2)).eval()
    refusal = (
        r"'0': aten\.conv_transpose2d.*output_padding \(2, 2\) must be smaller than stride \(2, 2\)"
        "|could not capture Sequential: output padding must be smaller than either stride"
    )
    with pytest.raises((UnsupportedOpError, CaptureError), match=refusal):
        convloom.compile(module, nets.inputs_of(IMAGE), target="reference")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 8, 3), (6, 19)),
        (nn.Conv3d(4, 8, 3), VOLUME[1:]),
        (nn.ConvTranspose2d(6, 8, 3), IMAGE[1:]),
        (nn.MaxPool3d(2), VOLUME[1:]),
        (nn.AdaptiveAvgPool1d(2), (6, 19)),
        (nn.AdaptiveMaxPool3d(2), VOLUME[1:]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unbatched_input_is_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedOpError, match="pass a batch dimension"):
        convloom.compile(nn.Sequential(layer).eval(), nets.inputs_of(shape), target="reference")
