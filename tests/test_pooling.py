"""Pooling of every kind through the whole compiler: what the generic tests of ops do not ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes.recognise import recognise_composites
from convloom.compiler.records import rank
from convloom.errors import InvalidInputError, UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import config
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.devices import offline
from convloom.kernels.pooling import pool
from convloom.kernels.pooling.median_pool import MedianPool2d
from convloom.kernels.pooling.pool_window import LpPool2d, MaxPool2d, Pool
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import harness, nets

IMAGE, SEQUENCE, VOLUME = (2, 6, 9, 7), (2, 6, 19), (2, 4, 5, 6, 7)


def compiled(
    function: Callable[..., Any],
    shape: tuple[int, ...],
    *,
    options: dict[str, Any] | None = None,
    **layers: nn.Module,
) -> Any:
    """A network compiled for the interpreter without torch ops, its results found right."""
    module, inputs = nets.make(function, shape, **layers)
    options = options or {}
    exe = convloom.compile(module, inputs, target="interpreter", **options)
    assert exe.summary["torch_fallbacks"] == 0
    nets.check(exe(*inputs), module, inputs, options.get("dtype"))
    return exe


def ops(exe: Any) -> list[str]:
    """The ops of the steps, without the conversions at the boundary."""
    return [step.op for step in exe.plan.steps if step.op not in ("relayout", "reshape")]


# Indices and unpooling.


class SegNet(nn.Module):
    """An encoder that remembers where its maxima stood, and a decoder that puts values back there
    (V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet", 2015)."""

    def __init__(self) -> None:
        super().__init__()

        def block(c: int, k: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k), nn.ReLU())

        self.enter, self.deeper = block(6, 8), block(8, 12)
        self.rise, self.leave = block(12, 8), nn.Conv2d(8, 3, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        first, at_first = self.pool(self.enter(x))
        second, at_second = self.pool(self.deeper(first))
        y = self.rise(self.unpool(second, at_second, first.shape[2:]))
        result: Tensor = self.leave(self.unpool(y, at_first, x.shape[2:]))
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", ["default", "none"])
def test_an_encoder_and_decoder_with_indices(passes: str, dtype: torch.dtype | None) -> None:
    module, inputs = nets.randomise(SegNet()), nets.inputs_of((2, 6, 10, 13))
    exe = convloom.compile(module, inputs, target="interpreter", passes=passes, dtype=dtype)
    assert exe.summary["torch_fallbacks"] == 0
    if dtype is None:
        nets.check(exe(*inputs), module, inputs)
    # In half precision near ties may fall to another pixel: the fused graph itself is the truth.
    reference = convloom.compile(module, inputs, target="reference", passes=passes, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is None else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(exe(*inputs), reference(*inputs), **close)
    assert ops(exe).count("max_unpool2d") == 2


@pytest.mark.interpreter
@pytest.mark.parametrize("passes", ["default", "none"])
def test_indices_of_adaptive_poolings(passes: str) -> None:
    """Where windows are alike; what nobody reads is not computed."""

    def pooled(m: Any, x: torch.Tensor) -> Any:
        row = F.adaptive_max_pool1d(x[:, :, 0], 3, return_indices=True)
        return F.adaptive_max_pool2d(x, (2, 3), return_indices=True), row

    module, inputs = nets.make(pooled, (2, 4, 6, 9))
    exe = convloom.compile(
        module, inputs, target="interpreter", dynamic_batch=(1, 2), passes=passes
    )
    for got, wanted in zip(*map(tree_leaves, (exe(*inputs), module(*inputs))), strict=True):
        assert got.dtype is wanted.dtype and torch.equal(got, wanted)
    largest, inputs = nets.make(lambda m, x: F.adaptive_max_pool2d(x, 3), (2, 4, 6, 9))
    assert ops(convloom.compile(largest, inputs, target="interpreter")) == ["adaptive_max_pool2d"]
    uneven, inputs = nets.make(lambda m, x: F.adaptive_max_pool2d(x, 4, True)[1], (2, 4, 6, 9))
    with pytest.raises(convloom.UnsupportedOpError, match="its result 1 is not computed"):
        convloom.compile(uneven, inputs, target="reference")


@pytest.mark.interpreter
def test_indices_are_returned_as_torch_returns_them() -> None:
    module, inputs = nets.make(
        lambda m, x: F.max_pool2d(torch.relu(x), 3, 2, 1, return_indices=True), IMAGE
    )
    for dtype in (None, torch.float16):
        exact = tuple(x.to(dtype).to(x.dtype) if dtype else x for x in inputs)
        exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
        for got, wanted in zip(exe(*exact), module(*exact), strict=True):
            assert got.dtype is wanted.dtype
            assert torch.equal(got, wanted)


@pytest.mark.interpreter
def test_indices_of_any_batch_of_a_range() -> None:
    module, inputs = nets.make(
        lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (3, 4, 6, 8)
    )
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 4))
    for batch in (1, 4):
        (x,) = nets.inputs_of((batch, 4, 6, 8), seed=batch)
        assert torch.equal(exe(x), module(x))


@pytest.mark.interpreter
def test_sequences_are_unpooled_too() -> None:
    exe = compiled(
        lambda m, x: F.max_unpool1d(*F.max_pool1d(x, 3, 2, 1, return_indices=True), 3, 2, 1, (19,)),
        SEQUENCE,
    )
    assert ops(exe) == ["max_pool2d_with_indices", "max_unpool2d"]


@pytest.mark.interpreter
def test_indices_that_nobody_reads_cost_nothing() -> None:
    exe = compiled(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0] + 1.0, IMAGE)
    assert ops(exe) == ["max_pool2d"]


def refusal(function: Callable[..., Any], shape: tuple[int, ...] = IMAGE) -> str:
    """What compile says of a network that it does not support."""
    module, inputs = nets.make(function, shape)
    with pytest.raises(UnsupportedOpError) as raised:
        convloom.compile(module, inputs, target="reference")
    return str(raised.value)


def test_what_indices_are_not_for_is_refused() -> None:
    pooled = lambda x: F.max_pool2d(x, 2, return_indices=True)  # noqa: E731
    assert "dtype torch.int64 is not supported" in refusal(lambda m, x: pooled(x)[1] + 1)
    flipped = refusal(lambda m, x: F.max_unpool2d(pooled(x)[0], pooled(x)[1].transpose(0, 1), 2),
                      (6, 6, 8, 8))  # fmt: skip
    assert "its indices must come straight from a max pooling" in flipped
    smaller = refusal(lambda m, x: F.max_unpool2d(*pooled(x), 2, output_size=(8, 6)))
    assert "fewer pixels than the image (9, 7)" in smaller
    assert "output_size=(9, 7)" in smaller


# Medians.


MEDIANS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).median(-1).values,
    "view": lambda x: (
        x.unfold(3, 2, 2).unfold(2, 3, 1).contiguous().view(2, 6, 7, 3, 6).median(4).values
    ),
    "border": lambda x: (
        F.pad(x, (1, 1, 1, 1), "reflect").unfold(2, 3, 2).unfold(3, 3, 2)
        .reshape(2, 6, 5, 4, -1).median(dim=-1)[0]
    ),
    "columns": lambda x: (
        F.unfold(x, 3, padding=1, stride=2).view(2, 6, 9, 20).median(2).values.view(2, 6, 5, 4)
    ),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("spelling", MEDIANS)
def test_medians_of_windows(spelling: str) -> None:
    function = MEDIANS[spelling]
    exe = compiled(lambda m, x: torch.relu(function(m.conv(x))), IMAGE, conv=nn.Conv2d(6, 6, 1))
    assert ops(exe)[-1] == "median_pool2d", "the activation stayed outside"


@pytest.mark.interpreter
def test_medians_keep_nan_and_take_the_lower_of_two() -> None:
    module, _ = nets.make(lambda m, x: x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).median(-1)[0],
                          IMAGE)  # fmt: skip
    x = torch.tensor([[4.0, 3, 1, float("nan")], [1, 2, 1, 1]]).view(1, 1, 2, 4)
    exe = convloom.compile(module, (x,), target="interpreter")
    torch.testing.assert_close(
        exe(x), torch.tensor([[[[2.0, float("nan")]]]]), equal_nan=True, rtol=0, atol=0
    )


def declined(function: Callable[[Tensor], Any], shape: tuple[int, ...] = IMAGE) -> list[str]:
    """Why the rules for medians left a network alone."""
    graph, ledger = nets.captured(*nets.make(lambda m, x: function(x), shape)), Ledger()
    recognise_composites(graph, ledger)
    return [str(event.reason) for event in ledger.events if "median" in event.rule]


def test_other_medians_are_left_alone() -> None:
    def windows(x: Tensor, size: int) -> Tensor:
        return x.unfold(2, size, 1).unfold(3, size, 1).flatten(-2)

    (over_rows,) = declined(lambda x: windows(x, 3).median(2).values)
    assert "not that of whole windows but over dimension 2" in over_rows
    (large,) = declined(lambda x: windows(x, 8).median(-1).values, (1, 2, 9, 9))
    assert large.startswith("a window of (8, 8) has more than 49 elements")
    (both,) = declined(lambda x: sum(windows(x, 3).median(-1)))
    assert both == "the indices of median are read too, and median_pool2d has none"
    (dilated,) = declined(lambda x: F.unfold(x, 3, 2).view(2, 6, 9, 15).median(2).values)
    assert dilated.startswith("the windows are dilated")
    (channels,) = declined(
        lambda x: x.unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2).median(-1).values
    )
    assert channels == "the windows do not run over height and width"


# Norms, sums, pyramids, any size.


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.5, 3.0, float("inf")], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_of_windows_of_either_sign(dims: int, norm: float) -> None:
    """Torch's definition: no absolute value, so a negative sum has no root (NaN) but for p = 1."""
    layer = {1: nn.LPPool1d, 2: nn.LPPool2d, 3: nn.LPPool3d}[dims]
    shape = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}[dims]
    exe = compiled(lambda m, x: m.pool(x), shape, pool=layer(norm, 2))  # type: ignore[abstract]
    if dims < 3 and norm != float("inf"):
        assert ops(exe) == ["lp_pool2d"]


def unrolls(attributes: Pool) -> bool:
    op = registry.get("lp_pool2d" if isinstance(attributes, LpPool2d) else "max_pool2d")
    x = TensorSpec((1, 8, 32, 32), torch.float32, Layout.NHWC)
    return pool.unrolls(harness.problem_for(op, attributes, (x,)))


@pytest.mark.interpreter
def test_taps_are_unrolled_where_there_are_few() -> None:
    small, large = ((5, 5), (2, 2)), ((5, 6), (2, 2))
    assert unrolls(MaxPool2d(*small)) and not unrolls(MaxPool2d(*large))
    powers = {2.0: True, 16.0: True, 17.0: False, 1.5: False}
    for norm, is_unrolled in powers.items():
        assert unrolls(LpPool2d(norm, *small)) is is_unrolled


@pytest.mark.parametrize(
    ("attributes", "unrolled"),
    [
        (MaxPool2d((5, 5), (1, 1)), True),
        (MaxPool2d((2, 13), (1, 1)), False),
        (LpPool2d(16.0, (2, 2), (2, 2)), True),
        (LpPool2d(17.0, (2, 2), (2, 2)), False),
        (LpPool2d(2.5, (2, 2), (2, 2)), False),
    ],
)
def test_windows_of_25_cheap_taps_are_unrolled(attributes: Pool, unrolled: bool) -> None:
    """The power of a tap is not cheap where it takes logarithms in fp64."""
    assert unrolls(attributes) is unrolled


def test_rows_of_a_program_share_what_they_read() -> None:
    """Four rows of a tile each, not a tile of four times the pixels for each of four rows: 11
    instructions per result of a 3x3 maximum instead of 25, and no spill."""
    x, op = TensorSpec((32, 192, 35, 35), torch.float16, Layout.NHWC), registry.get("max_pool2d")
    problem = harness.problem_for(op, MaxPool2d((3, 3), (1, 1), (1, 1)), (x,))
    target, counts = targets.parse("cuda:sm_90"), {}
    tile = op.default(problem, target)
    assert tile["TILE_ROWS"] == 4
    for rows in (1, 4):
        chosen = config(4, 1, **{**dict(tile.blocks), "TILE_ROWS": rows})
        (launch,) = op.launches(problem, chosen, target)
        assert launch.block_rows == tile["BLOCK_ROWS"]
        (wanted,) = rank.requests(op, problem, (launch,), target)
        report = offline.report(wanted)
        assert report.spill_bytes == 0 and report.registers <= 72
        counts[rows] = sum(report.instructions.values()) / rows
    assert counts[4] < counts[1] / 2


def test_medians_of_more_elements_than_registers_are_not_searched() -> None:
    """Forced they may be: whether they spill the compiler's report tells."""
    op, x = registry.get("median_pool2d"), TensorSpec((1, 64, 9, 9), torch.float32, Layout.NHWC)
    problem = harness.problem_for(op, MedianPool2d((5, 5), (1, 1)), (x,))
    sm_90 = targets.parse("cuda:sm_90")
    few, many = (config(4, 1, BLOCK_ROWS=rows, BLOCK_COLUMNS=64) for rows in (8, 16))
    assert few in op.configs(problem, sm_90) and many not in op.configs(problem, sm_90)
    assert op.legal(problem, many, sm_90) is None


@pytest.mark.parametrize("norm", [0.0, -3.0, float("inf"), float("nan")])
def test_a_norm_is_a_positive_number(norm: float) -> None:
    x = TensorSpec((1, 2, 4, 4), torch.float32, Layout.NHWC)
    attributes = LpPool2d(norm, (2, 2), (2, 2))
    with pytest.raises(InvalidInputError, match="norm"):
        registry.get("lp_pool2d").infer(attributes, (x,))


@pytest.mark.parametrize("norm", [float("inf"), -3.0])
@pytest.mark.parametrize("dims", [1, 2])
def test_powers_that_are_no_norm_are_computed_as_written(dims: int, norm: float) -> None:
    """Torch 2.11 writes the infinite norm as any other: a power of infinity, its root one of 0."""
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d}[dims]

    def written(m: Any, x: Tensor) -> Tensor:
        mean = pool(x.pow(norm), 2)
        return (torch.sign(mean) * torch.relu(torch.abs(mean))).mul(2.0**dims).pow(1.0 / norm)

    exe = compiled(written, {1: SEQUENCE, 2: IMAGE}[dims])
    assert "lp_pool2d" not in ops(exe)


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_norms_of_windows_that_overhang(norm: float) -> None:
    pool = nn.LPPool2d(norm, 3, stride=2, ceil_mode=True)
    exe = compiled(lambda m, x: m.pool(torch.relu(x)), (2, 6, 8, 6), pool=pool)
    assert "lp_pool2d" in ops(exe)


@pytest.mark.interpreter
@pytest.mark.parametrize("dims", [2, 3])
def test_sums_of_windows(dims: int) -> None:
    pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](2, divisor_override=1)
    exe = compiled(lambda m, x: m.pool(x), {2: IMAGE, 3: VOLUME}[dims], pool=pool)
    assert ops(exe) == [f"avg_pool{dims}d"]


@pytest.mark.interpreter
def test_a_spatial_pyramid_gives_any_image_as_many_features() -> None:
    """K. He et al., "Spatial pyramid pooling in deep convolutional networks", 2014."""

    def pyramid(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.conv(x))
        levels = [F.adaptive_max_pool2d(y, size).flatten(1) for size in (4, 2, 1)]
        result: Tensor = m.head(torch.cat(levels, 1))
        return result

    for shape in (IMAGE, (2, 6, 13, 6)):
        exe = compiled(pyramid, shape, conv=nn.Conv2d(6, 8, 3), head=nn.Linear(8 * 21, 5))
        assert exe.plan.outputs[0].spec.shape == (2, 5)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AdaptiveAvgPool1d(5), SEQUENCE), (nn.AdaptiveMaxPool1d(7), SEQUENCE),
        (nn.AdaptiveAvgPool2d((5, None)), IMAGE), (nn.AdaptiveMaxPool2d((11, 3)), IMAGE),
        (nn.AdaptiveAvgPool3d((2, 4, 3)), VOLUME), (nn.AdaptiveMaxPool3d(1), VOLUME),
        (nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False), SEQUENCE),
        (nn.MaxPool1d(3, 2, 1, dilation=2), SEQUENCE),
        (nn.AvgPool3d(3, 2, 1, count_include_pad=False), VOLUME),
        (nn.MaxPool3d((1, 3, 2), (1, 2, 3), (0, 1, 1)), VOLUME),
    ],
    ids=str,
)  # fmt: skip
def test_adaptive_and_windowed_pooling_of_any_dimension(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    compiled(lambda m, x: m.pool(x), shape, pool=layer)


# Pooling in the Fourier domain.


class SpectralPool2d(nn.Module):
    """Keeps the lowest frequencies of an image (O. Rippel, J. Snoek, R. Adams, "Spectral
    representations for convolutional neural networks", 2015): (N, C, H, W) -> (N, C, P, Q).

    A discrete Fourier transform, the crop and the transform back are linear in every dimension
    alone: one matrix each, that of a band-limited resampling. P and Q are odd, so that every
    frequency that is kept has its mirror image.
    """

    def __init__(self, image: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("height", self.matrix(image[0], size[0]))
        self.register_buffer("width", self.matrix(image[1], size[1]))

    @staticmethod
    def matrix(length: int, kept: int) -> Tensor:
        """(kept, length): a real matrix, the sum of cosines over the kept frequencies."""
        frequency = torch.arange(-(kept // 2), kept // 2 + 1, dtype=torch.float64)
        new, old = (torch.arange(n, dtype=torch.float64) / n for n in (kept, length))
        angle = 2 * torch.pi * frequency * (new[:, None, None] - old[None, :, None])
        return (torch.cos(angle).sum(-1) / length).float()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.width)  # type: ignore[arg-type]
        y = F.linear(y.transpose(2, 3), self.height)  # type: ignore[arg-type]
        return y.transpose(2, 3)


def cropped_spectrum(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The same by Fourier transforms."""
    (h, w), (p, q) = x.shape[2:], size
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(2, 3))
    top, left = h // 2 - p // 2, w // 2 - q // 2
    kept = torch.fft.ifftshift(spectrum[:, :, top : top + p, left : left + q], dim=(2, 3))
    return torch.fft.ifft2(kept).real * (p * q / (h * w))


@pytest.mark.interpreter
def test_pooling_in_the_fourier_domain_by_two_products() -> None:
    module, (x,) = SpectralPool2d((9, 8), (5, 3)).eval(), nets.inputs_of((2, 6, 9, 8))
    exe = convloom.compile(module, (x,), target="interpreter")
    torch.testing.assert_close(exe(x), cropped_spectrum(x, (5, 3)), rtol=1e-5, atol=1e-5)
    assert ops(exe).count("linear") == 2 and exe.summary["torch_fallbacks"] == 0


# Mixtures.


class MixedPool2d(nn.Module):
    """alpha·max + (1 - alpha)·average, alpha learned: one, or one per channel (C.-Y. Lee,
    P. Gallagher, Z. Tu, "Generalizing pooling functions in CNNs", 2016)."""

    def __init__(self, kernel: int, stride: int, channels: int | None = None) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.alpha = nn.Parameter(torch.rand(() if channels is None else (channels, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        most = F.max_pool2d(x, self.kernel, self.stride)
        mean = F.avg_pool2d(x, self.kernel, self.stride)
        return self.alpha * most + (1 - self.alpha) * mean


@pytest.mark.interpreter
@pytest.mark.parametrize("channels", [None, 8])
def test_learned_mixtures_of_maximum_and_average(channels: int | None) -> None:
    exe = compiled(
        lambda m, x: torch.relu(m.pool(m.conv(x))), IMAGE,
        conv=nn.Conv2d(6, 8, 1), pool=MixedPool2d(3, 2, channels),
    )  # fmt: skip
    assert ops(exe) == ["conv2d", "mixed_pool2d"], "mixing is one kernel, activation included"


@pytest.mark.interpreter
def test_mixtures_that_one_kernel_cannot_do_are_two_poolings() -> None:
    """Padded windows have averages of fewer pixels; a gate computed from the image is no weight."""
    exe = compiled(lambda m, x: 0.5 * F.max_pool2d(x, 3, 2, 1) + 0.5 * F.avg_pool2d(x, 3, 2, 1),
                   IMAGE)  # fmt: skip
    assert sorted(ops(exe)) == ["avg_pool2d", "max_pool2d"]
    exe = compiled(
        lambda m, x: (
            torch.sigmoid(m.gate(x)) * F.max_pool2d(x, 2)
            + (1 - torch.sigmoid(m.gate(x))) * F.avg_pool2d(x, 2)
        ),
        IMAGE,
        gate=nn.Conv2d(6, 6, 2, 2, groups=6),
    )
    assert "mixed_pool2d" not in ops(exe)
