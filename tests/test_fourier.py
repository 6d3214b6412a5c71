"""Fourier transforms of a fixed size, as products with constant matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.capture.fourier import TRANSFORMS

from . import nets

SHAPE = (2, 3, 6, 5)
WEIGHT = torch.randn(3, 6, 3, 2, generator=torch.Generator().manual_seed(0))


def global_filter(m: Any, x: torch.Tensor) -> torch.Tensor:
    """As GFNet filters: by products with learned frequencies."""
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(m.weight)
    return torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")


def spectral_relu(m: Any, x: torch.Tensor) -> torch.Tensor:
    """As fast Fourier convolutions do: real and imaginary parts as channels."""
    spectrum = torch.view_as_real(torch.fft.rfftn(x, dim=(2, 3))).movedim(-1, 2).flatten(1, 2)
    parts = spectrum.relu().unflatten(1, (x.shape[1], 2)).movedim(2, -1).contiguous()
    return torch.fft.irfftn(torch.view_as_complex(parts), s=x.shape[2:], dim=(2, 3))


def exchanged(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    size, angle = torch.fft.fft2(x).abs(), torch.fft.fft2(y + 3.0).angle()
    return torch.fft.ifft2(torch.polar(size, angle)).real


def correlated(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    product = torch.fft.rfft2(x) * torch.fft.rfft2(y).conj()
    return torch.fft.irfft2(product / (product.abs() + 1.0), s=x.shape[2:])


CALLS: dict[str, Callable[..., Any]] = {
    "magnitudes, shifted": lambda m, x: torch.fft.fftshift(torch.fft.rfft2(x).abs().log1p(), 2),
    "parts": lambda m, x: (torch.fft.fft(x, dim=2).real, torch.fft.ifft(x, norm="forward").imag),
    "the image's dimensions, as FNet": lambda m, x: torch.fft.fftn(x, dim=(1, 2, 3)).real,
    "fewer and more points": lambda m, x: torch.fft.irfft(torch.fft.rfft(x, n=7), n=4),
    "a spectrum that is cut": lambda m, x: (
        torch.fft.ifft2(
            torch.fft.ifftshift(
                torch.fft.fftshift(torch.fft.fft2(x), (2, 3))[:, :, 1:4, 1:4], (2, 3)
            )
        ).real
    ),
    "sums and quotients": lambda m, x: torch.view_as_real(
        (torch.cat([torch.fft.fft(x), 2 - torch.fft.fft(x + 1)], 1) * (1 + 2j) - 3.0) / (2 - 1j)
    ),
    "beside real tensors": lambda m, x: torch.view_as_real(
        torch.cat([torch.fft.fft(x), x + 0j, torch.fft.fft(x).mean(1, True) + x], 1)
    ),
    "autocorrelation": lambda m, x: torch.fft.irfft(torch.fft.rfft(x).abs().square(), n=5),
    "global filter": global_filter,
    "spectral ReLU": spectral_relu,
    "amplitude and phase": exchanged,
    "phase correlation": correlated,
}


def compiled(name: str, target: str) -> tuple[Any, Any, Any]:
    function = CALLS[name]
    shapes = (SHAPE,) * (function.__code__.co_argcount - 1)
    module, inputs = nets.make(function, *shapes)
    module.register_buffer("weight", WEIGHT)
    return module, inputs, convloom.compile(module, inputs, target=target, dynamic_batch=(1, 2))


QUICK = ("global filter", "spectral ReLU", "beside real tensors")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CALLS],
)
def test_transforms_are_products(name: str) -> None:
    module, inputs, exe = compiled(name, "reference")
    assert exe.summary["torch_fallbacks"] == 0
    for batch in (1, 2):
        given = tuple(x[:batch] for x in inputs)
        nets.check(exe(*given), module, given)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["global filter", "fewer and more points"])
def test_the_kernels_of_transforms(name: str) -> None:
    module, inputs, exe = compiled(name, "interpreter")
    nets.check(exe(*inputs), module, inputs)


@pytest.mark.parametrize("call", TRANSFORMS, ids=str)
@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_every_transform_is_as_exact_as_torchs(call: Any, norm: str) -> None:
    x = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for given in (x, torch.complex(x, x.flip(0))):
        if given.is_complex() and "aten.fft_rfft" in str(call):
            continue  # Of real numbers only.
        result, expected = TRANSFORMS[call](given, norm=norm), call(given, norm=norm)
        if expected.is_complex():
            expected = torch.view_as_real(expected.resolve_conj())
        result = result if isinstance(result, torch.Tensor) else torch.stack(result, -1)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def written(spectrum: torch.Tensor) -> torch.Tensor:
    torch.view_as_real(spectrum)[..., 0].mul_(2)
    return spectrum


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.fft.fft(x, dim=0).abs(),
        lambda m, x: torch.fft.rfft2(x).exp().abs(),
        lambda m, x: torch.fft.hfft(x),
        lambda m, x: torch.fft.hfft(torch.fft.rfft(x) * 2j),
        lambda m, x: torch.fft.rfft2(x),
        lambda m, x: torch.fft.rfft2(x).abs() + written(torch.fft.rfft2(x)).abs(),
    ],
    ids=[
        "along the batch",
        "a function of complex numbers",
        "another transform",
        "an imaginary factor",
        "as a result",
        "written into",
    ],
)
def test_what_stays_refused_says_what_to_do(function: Any) -> None:
    module, inputs = nets.make(function, SHAPE)
    with pytest.raises(convloom.UnsupportedOpError, match=r"torch\.view_as_real"):
        convloom.compile(module, inputs, target="reference", dynamic_batch=(1, 2))


def test_a_complex_buffer() -> None:
    module, (x,) = nets.make(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.turn + m.turn, n=5), SHAPE
    )
    module.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))
    exe = convloom.compile(module, (x,), target="reference")
    torch.testing.assert_close(exe(x), module(x), rtol=1e-5, atol=1e-5)


def test_magnitudes_of_halves_do_not_overflow() -> None:
    module, (x,) = nets.make(lambda m, x: torch.fft.rfft(x).abs(), (2, 3, 4, 64))
    exe = convloom.compile(module, (x,), target="reference", dtype=torch.float16)
    result = exe(x.abs() * 64)
    expected = torch.fft.rfft(x.abs().double() * 64).abs()
    assert result.isfinite().all() and expected.max() > 2000
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=4.0)


def test_zeros_of_the_matrices_are_exact() -> None:
    """Else the angle of what is real would be that of rounding errors: pi or minus pi."""
    module, (x,) = nets.make(lambda m, x: torch.fft.rfft2(x).imag, (2, 3, 8, 6))
    imaginary = convloom.compile(module, (x,), target="reference")(x)
    assert (imaginary[:, :, ::4, ::3] == 0).all() and (imaginary != 0).any()


def test_hypotenuses_of_special_values() -> None:
    values = torch.tensor([0.0, 1e-30, 3.0, 1e38, torch.inf])
    x, y = (one.contiguous() for one in torch.meshgrid(values, -values, indexing="ij"))
    module, _ = nets.make(lambda m, x, y: torch.hypot(x, y), (5, 5), (5, 5))
    exe = convloom.compile(module, (x, y), target="reference")
    torch.testing.assert_close(exe(x, y), torch.hypot(x, y))
