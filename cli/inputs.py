"""Files as model inputs: photographs and arrays, checked before a kernel sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError, ConvloomError, InvalidInputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ..zoo import ZooModel

# Mean and standard deviation of ImageNet's training images, in [0, 1]; for grey their averages.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_DEVIATION = 0.449, 0.226
CROP_SHARE = 0.875
"""224 of 256 pixels: the part of the shorter side that evaluation on ImageNet looks at."""
DIGIT_MODELS = ("lenet5",)
"""Trained on bright ink over black in [0, 1], the digit filling the image."""


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
    return image_tensor(_read_image(path), entry)


def _read_array(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"input '{path}': expected a .npy file of numbers, got {error or type(error).__name__}"
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


def _read_image(path: Path) -> Image:
    """Raises: ArtifactError when the file is no image that Pillow can decode."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ConvloomError(
            "reading images needs Pillow, which is not installed: pip install 'convloom[demo]'"
        ) from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ArtifactError(
            f"input '{path}': expected an image or a .npy file; its content is no known image"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"input '{path}': the image cannot be decoded: {error}") from error


def image_tensor(image: Image, entry: ZooModel) -> torch.Tensor:
    """The image as the model's input: (1, C, H, W) float32.

    Grey for models of one channel; resized and cropped from the centre, unless it has the size
    already; normalised with ImageNet's mean and deviation, for digits to bright ink in [0, 1].
    """
    import numpy as np
    import torch

    channels, height, width = entry.input_shape
    digits = entry.name in DIGIT_MODELS
    image = image.convert("L" if channels == 1 else "RGB")
    image = _fitted(image, height, width, 1.0 if digits else CROP_SHARE)
    values = np.asarray(image, np.float32).reshape(height, width, channels)
    pixels = torch.from_numpy(values.transpose(2, 0, 1) / 255).unsqueeze(0)
    if digits:
        # Paper is bright and ink dark in most scans; the network learnt the opposite.
        return 1 - pixels if _border(pixels) > 0.5 else pixels
    if channels == 1:
        return (pixels - GREY_MEAN) / GREY_DEVIATION
    mean, deviation = (torch.tensor(each).view(1, -1, 1, 1) for each in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def _border(pixels: torch.Tensor) -> float:
    """Mean brightness of the outermost pixels."""
    inner = pixels[:, :, 1:-1, 1:-1]
    return ((pixels.sum() - inner.sum()) / (pixels.numel() - inner.numel())).item()


def _fitted(image: Image, height: int, width: int, share: float) -> Image:
    """The centre of the image, `share` of its shorter side, at the wanted size."""
    from PIL import Image

    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width) / share
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
