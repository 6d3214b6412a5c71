"""Files as model inputs: photographs and arrays, checked before a kernel sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import zoo
from ..errors import ArtifactError, ConvloomError, InvalidInputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ..kernels.contract.spec import TensorSpec
    from ..zoo import ZooModel

# Mean and standard deviation of ImageNet's training images, in [0, 1]; for grey their averages.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_DEVIATION = 0.449, 0.226
CROP_SHARE = 0.875
"""224 of 256 pixels: the part of the shorter side that evaluation on ImageNet looks at."""
DIGIT_MODELS = ("lenet5",)
"""Trained on bright ink over black in [0, 1], the digit filling the image."""
HALF_RANGE_MODELS = (
    "googlenet", "inception_v3", "inception_v4", "inception_resnet_v2", "mobilenet_v1",
    "preact_resnet18", "preact_resnet50",
)  # fmt: skip
"""Whose published weights (torchvision's and timm's) take pixels in [-1, 1]."""
LARGEST_SEEN_WHOLE = 64
"""Networks for larger images than this are evaluated on a crop of a larger image."""
MOST_PIXELS = 1 << 25
"""Of a resized image: 400 MB as fp32 in three colours."""
TEN_CROPS = 10
SAMPLE = Path(zoo.__file__).with_name("digit.png")
"""A handwritten digit that LeNet-5 was not trained on (of scikit-learn's scans)."""


def present(path: Path) -> Path:
    """The file, or where there is none, the image of that name that comes with convloom."""
    return SAMPLE if path == Path(SAMPLE.name) and not path.exists() else path


def entry_of(shown: str, name: str, given: Sequence[torch.Tensor | TensorSpec]) -> ZooModel:
    """What images have to become for a network that is none of the zoo, by the tensors it takes.

    shown: the command and the network, in words.

    Raises: InvalidInputError where they are not one image of floats.
    """
    from ..zoo import ZooModel

    if len(given) != 1 or len(given[0].shape) != 4 or not given[0].dtype.is_floating_point:
        kinds = [str(each.dtype).removeprefix("torch.") for each in given]
        found = (f"{kind} {tuple(x.shape)}" for kind, x in zip(kinds, given, strict=True))
        raise InvalidInputError(
            f"{shown}: expected a network of one image of floats (N, C, H, W), it takes "
            f"{', '.join(found)}; call it in Python"
        )
    _, channels, height, width = given[0].shape
    return ZooModel(name, "", (channels, height, width), 0, "")


def read_input(path: Path, entry: ZooModel) -> torch.Tensor:
    """An image file as a batch of one, or the array of a .npy file: (N, C, H, W) float32.

    Raises: ArtifactError for a file that is missing or not what it claims, InvalidInputError for an
    array of the wrong shape or type, ConvloomError where Pillow is missing.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ArtifactError(f"input '{path}': expected an image or a .npy file, got {found}")
    if path.suffix == ".npy":
        return _read_array(path, entry.input_shape)
    return image_tensor(read_image(path, entry), entry)


def _read_array(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    import numpy as np
    import torch

    try:
        # Mapped: a header may claim more than any memory holds, the file cannot.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("several arrays")
    except Exception as error:  # Numpy has as many errors as headers have ways to be wrong.
        raise ArtifactError(
            f"input '{path}': expected a .npy file of numbers, got "
            f"{error if str(error) else type(error).__name__}"
        ) from error
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != shape or not array.shape[0]:
        channels, height, width = shape
        raise InvalidInputError(
            f"input '{path}': expected shape ({channels}, {height}, {width}) or "
            f"(N, {channels}, {height}, {width}), got {array.shape}"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidInputError(
            f"input '{path}': expected floating-point numbers, normalised as the model was "
            f"trained, got {array.dtype}"
        )
    return torch.from_numpy(array.astype(np.float32))


def read_image(path: Path, entry: ZooModel) -> Image:
    """The image, upright, of 8 bits.

    Raises: ArtifactError when Pillow cannot decode the file, or it would be too large
    once it is resized for the model; ConvloomError where Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ConvloomError(
            "reading images needs Pillow, which is not installed: pip install pillow"
        ) from error
    try:
        with Image.open(path) as image:
            _check_size(path, image.size, entry)  # By the header: nothing is decoded yet.
            return _in_bytes(path, ImageOps.exif_transpose(image))
    except ArtifactError:
        raise
    except UnidentifiedImageError as error:
        raise ArtifactError(
            f"input '{path}': expected an image or a .npy file; Pillow knows no "
            "such image"
        ) from error
    except Exception as error:  # Each of Pillow's formats has errors of its own.
        raise ArtifactError(f"input '{path}': the image cannot be decoded: {error}") from error


def _check_size(path: Path, size: tuple[int, int], entry: ZooModel) -> None:
    """Refuses what resizing by the shorter side would make larger than memory."""
    _, height, width = entry.input_shape
    share = height / CROP_SHARE / size[1], width / CROP_SHARE / size[0]
    pixels = size[0] * size[1] * max(*share, 1.0) ** 2
    most = max(MOST_PIXELS, 2 * height * width)
    if pixels > most:
        raise ArtifactError(
            f"input '{path}': an image of {size[0]} x {size[1]} has {pixels:,.0f} pixels once its "
            f"shorter side is as long as {entry.name} wants it, expected at most {most:,}; crop it"
        )


def _in_bytes(path: Path, image: Image) -> Image:
    """The image with values from 0 to 255, to which Pillow clips wider ones.

    Raises: ArtifactError where nothing says what is white.
    """
    import numpy as np
    from PIL import Image

    if image.mode in ("I", "F"):
        kind = "32-bit whole" if image.mode == "I" else "floating-point"
        raise ArtifactError(
            f"input '{path}': expected an image of 8 or 16 bits, got {kind} numbers (Pillow's mode "
            f"{image.mode}), of which nothing says what is white; convert it, or pass a .npy file"
        )
    if not image.mode.startswith("I;16"):
        return image
    wide = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))


def image_tensor(image: Image, entry: ZooModel) -> torch.Tensor:
    """The image as the model's input: (1, C, H, W) float32.

    Grey for models of one channel; resized and cropped from the centre, unless it has the size
    already; normalised as the model's published weights expect, for digits to bright ink in [0, 1].
    """
    _, height, width = entry.input_shape
    if image.size != (width, height):
        image = _resized(image, height, width, 1.0 if entry.name in DIGIT_MODELS else CROP_SHARE)
    return _crops(_pixels(image, entry), height, width, 1)


def evaluation_crops(image: Image, entry: ZooModel, count: int) -> torch.Tensor:
    """The image as an evaluation of the model looks at it: (count, C, H, W) float32.

    One crop is the centre; ten are the four corners, the centre and their mirror images, whose
    predictions are averaged. The shorter side is resized to 8/7 of the model's input first (256 for
    224), but for one crop of a small image (CIFAR, digits), which is seen whole.

    Source: Krizhevsky, Sutskever, Hinton 2012, section 4.1.
    """
    _, height, width = entry.input_shape
    whole = count == 1 and max(height, width) <= LARGEST_SEEN_WHOLE
    image = _resized(image, height, width, 1.0 if whole else CROP_SHARE)
    return _crops(_pixels(image, entry), height, width, count)


def _pixels(image: Image, entry: ZooModel) -> torch.Tensor:
    """All of the image in the model's colours and scale: (C, h, w)."""
    import numpy as np
    import torch

    channels = entry.input_shape[0]
    image = image.convert("L" if channels == 1 else "RGB")
    values = np.asarray(image, np.float32).reshape(image.height, image.width, channels)
    pixels = torch.from_numpy(values.transpose(2, 0, 1) / 255)
    if entry.name in DIGIT_MODELS:
        # Paper is bright and ink dark in most scans; the network learnt the opposite.
        inner = pixels[:, 1:-1, 1:-1]
        border = (pixels.sum() - inner.sum()) / (pixels.numel() - inner.numel())
        return 1 - pixels if border > 0.5 else pixels
    if entry.name in HALF_RANGE_MODELS:
        return pixels * 2 - 1
    if channels == 1:
        return (pixels - GREY_MEAN) / GREY_DEVIATION
    mean, deviation = (torch.tensor(each).view(-1, 1, 1) for each in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def _resized(image: Image, height: int, width: int, share: float) -> Image:
    """The whole image, so large that (height, width) is `share` of it one way, less the other.

    Sizes are rounded as torchvision rounds them.
    """
    from PIL import Image

    tall = round(height / share), int(round(height / share) * image.width / image.height)
    wide = int(round(width / share) * image.height / image.width), round(width / share)
    rows, columns = max(tall, wide)
    if image.size == (columns, rows):
        return image
    return image.resize((columns, rows), Image.Resampling.BILINEAR)


def _crops(pixels: torch.Tensor, height: int, width: int, count: int) -> torch.Tensor:
    """The centre, or with ten crops also the corners, and all of these mirrored."""
    import torch

    below, right = pixels.shape[1] - height, pixels.shape[2] - width
    corners = [(round(below / 2), round(right / 2))]
    if count == TEN_CROPS:
        corners = [(0, 0), (0, right), (below, 0), (below, right), *corners]
    found = torch.stack(
        [pixels[:, top : top + height, left : left + width] for top, left in corners]
    )
    return torch.cat([found, found.flip(3)]) if count == TEN_CROPS else found
