"""Images, arrays and weights that are broken, or made to do harm: each ends in an error that names
the file, and takes neither memory nor time."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from convloom import zoo
from convloom.cli import inputs
from convloom.errors import ArtifactError, ConvloomError
from PIL import Image
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow and numpy tell what they skip.
ENTRY = zoo.entry("resnet18")
GREY = zoo.entry("lenet5")


def png(width: int, height: int, bits: int = 1) -> bytes:
    """A grey PNG of zeros that is a few bytes, whatever size it claims."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )

    header = struct.pack(">2I5B", width, height, bits, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(height * (1 + -(-width * bits // 8)), 1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*each) for each in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (80_000_000, 1), (1, 80_000_000)])
def test_an_image_that_resizing_would_blow_up_is_refused(
    size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(*size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"x.png': an image of .* crop it"):
        inputs.read_input(path, ENTRY)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("size", [(64, 3000), (4000, 6000), (1, 1), (224, 224)])
def test_an_image_of_any_usual_size_is_read(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", size).save(tmp_path / "x.png")
    assert inputs.read_image(tmp_path / "x.png", ENTRY).size == size


def test_an_image_of_16_bits_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(levels).save(tmp_path / "x.png")
    pixels = np.asarray(inputs.read_image(tmp_path / "x.png", GREY))
    np.testing.assert_array_equal(pixels, np.round(levels / 257.0).astype(np.uint8))


@pytest.mark.parametrize("mode, said", [("F", "floating-point numbers"), ("I", "32-bit whole")])
def test_an_image_of_which_nothing_says_what_is_white_is_refused(
    mode: str, said: str, tmp_path: Path
) -> None:
    Image.new(mode, (32, 32), 1).save(tmp_path / "x.tiff")
    with pytest.raises(ArtifactError, match=rf"x.tiff': expected an image of 8 .* got {said}"):
        inputs.read_input(tmp_path / "x.tiff", GREY)


FORMATS = ("png", "jpeg", "gif", "bmp", "tiff", "webp")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_image_is_named(kind: str, tmp_path: Path) -> None:
    """Cut off anywhere, and with bytes changed anywhere: an image or an error of ours."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    draw, whole, path = np.random.default_rng(1), file.getvalue(), tmp_path / f"x.{kind}"
    for turn in range(60):
        changed = bytearray(whole)
        for at in draw.integers(0, min(len(whole), 200 if turn % 2 else len(whole)), 4):
            changed[at] = draw.integers(0, 256)
        path.write_bytes(changed[: int(draw.integers(1, len(whole)))] if turn % 3 else changed)
        try:
            inputs.read_input(path, ENTRY)
        except ConvloomError as error:
            assert str(path) in str(error)


# Arrays.


def npy(shape: str, dtype: str = "'<f4'", data: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.zeros(3))


ARRAYS: dict[str, bytes | Callable[[Path], None]] = {
    "a pebibyte": npy("(281474976710656,)"),
    "more than numbers": npy("(9223372036854775807, 9223372036854775807)"),
    "negative": npy("(-1, 3, 224, 224)"),
    "cut": npy("(1, 3, 224, 224)", data=bytes(100)),
    "objects": npy("(1,)", "'|O'", bytes(100)),
    "a call": npy("(1,)", "__import__('os')"),
    "deep": npy("(" * 3000 + ")" * 3000),
    "no shape": npy("'x'"),
    "a record": npy("(1,)", "[('a', '<f4')]", bytes(4)),
    "several": npz,
    "empty": b"",
    "version": b"\x93NUMPY\x09\x00" + bytes(100),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_broken_array_is_named(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / "x.npy", ARRAYS[name]
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ConvloomError, match=r"x\.npy"):
        inputs.read_input(path, ENTRY)


# Weights.


def quantised(weight: Tensor) -> Tensor:
    return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


SPOILED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "int64": (lambda w: w.long(), "expected floats, got int64"),
    "int8": (lambda w: w.to(torch.int8), "expected floats, got int8"),
    "bool": (lambda w: w > 0, "expected floats, got bool"),
    "complex": (lambda w: w.to(torch.complex64), "expected floats, got complex64"),
    "sparse": (lambda w: w.to_sparse(), "expected floats, got float32 sparse_coo on cpu"),
    "meta": (lambda w: w.to("meta"), "expected floats, got float32 strided on meta"),
    "quantised": (quantised, "expected floats, got qint8 strided on cpu"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_weights_that_a_cast_would_ruin_are_refused(name: str, tmp_path: Path) -> None:
    spoil, message = SPOILED[name]
    model = zoo.lenet5()
    first = next(iter(model.state_dict()))
    path = tmp_path / "w.pth"
    torch.save({n: spoil(w) if n == first else w for n, w in model.state_dict().items()}, path)
    with pytest.raises(ArtifactError, match=rf"w.pth': .*{first} \({message}\)"):
        zoo.lenet5(weights=path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_floats_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: w.to(dtype) for name, w in zoo.lenet5().state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    loaded = zoo.lenet5(weights=tmp_path / "w.pth").state_dict()
    assert all(torch.equal(loaded[name], w.float()) for name, w in state.items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_broken_weights_are_named(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = zoo.lenet5()
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    for turn in range(60):
        changed = bytearray(whole)
        for at in draw.integers(0, 3000, 6):
            changed[at if turn % 2 else -at - 1] = draw.integers(0, 256)
        path.write_bytes(changed[: int(draw.integers(1, len(whole)))] if turn % 3 == 0 else changed)
        try:
            zoo.lenet5(weights=path)
        except ConvloomError as error:
            assert str(path) in str(error)
