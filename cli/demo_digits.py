"""The demo's first part: LeNet-5 reads real handwritten digits through our own kernels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import ConvloomError
from . import models, options, output

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from rich.console import Console

TITLE = "LeNet-5 reads handwritten digits"
BATCH = 64
GRID = (5, 12)
"""Rows and columns of the picture."""
CELL, CAPTION = 64, 18


def show(console: Console, folder: Path) -> dict[str, Any]:
    """Classifies the whole held-out split with torch and with the executable, and compares.

    Raises: ConvloomError where scikit-learn or Pillow is missing.
    """
    _require_pillow()
    from ..compiler.api import compile
    from ..zoo.digits import load_digits_split

    split = load_digits_split()
    images, labels = split.test_images, split.test_labels
    model = models.build("lenet5", weights="digits")
    target = options.default_target()
    with output.working(f"compiling LeNet-5 for {target}, any batch up to {BATCH}"):
        executable = compile(model, (images[:2],), target=target, dynamic_batch=(1, BATCH))
    console.print(f"{target}: {executable.summary_line()}")
    started = time.perf_counter()
    compiled = _in_batches(lambda x: models.run(executable, x), images)
    seconds = time.perf_counter() - started
    eager = _in_batches(model, images)
    predicted, expected = compiled.argmax(1), eager.argmax(1)
    agree = int((predicted == expected).sum())
    accuracy = {
        "compiled": (predicted == labels).double().mean().item(),
        "eager": (expected == labels).double().mean().item(),
    }
    console.print(
        f"{len(images)} held-out scans in batches of {BATCH}: {seconds:.1f} s\n"
        f"top-1 eager {accuracy['eager']:.2%}, compiled {accuracy['compiled']:.2%}; "
        f"the same answer for {agree} of {len(images)} images, "
        f"largest difference of a score {(compiled - eager).abs().max().item():.1e}"
    )
    path = folder / "digits.png"
    output.write_file(path, lambda file: _save(file, images, predicted, labels))
    console.print(f"picture of {GRID[0] * GRID[1]} scans with our answers: {path}", markup=False)
    return {
        "as_expected": agree == len(images),
        "target": target,
        "images": len(images),
        "agreeing": agree,
        "top1": accuracy,
        "picture": str(path),
    }


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ConvloomError(
            "the demo needs Pillow, which is not installed: pip install 'convloom[demo]'"
        ) from error


def _in_batches(network: Any, images: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        starts = range(0, len(images), BATCH)
        return torch.cat([network(images[start : start + BATCH]) for start in starts])


def _save(
    file: IO[bytes], images: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor
) -> None:
    grid(images, predicted, labels).save(file, format="PNG")


def grid(images: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor) -> Image:
    """The first scans with their predicted labels below, red where the label says otherwise.

    images: (N, 1, H, W) in [0, 1]; predicted, labels: (N,).
    """
    import torch.nn.functional as F
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = GRID
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    shown = F.interpolate(images[: rows * columns], size=(CELL - 4, CELL - 4), mode="nearest")
    for index, scan in enumerate((shown[:, 0] * 255).byte().numpy()):
        row, column = divmod(index, columns)
        left, top = column * CELL, row * (CELL + CAPTION)
        sheet.paste(Image.fromarray(scan).convert("RGB"), (left + 2, top + 2))
        right = bool(predicted[index] == labels[index])
        place = (left + CELL // 2, top + CELL + CAPTION // 2 - 2)
        color = "#1a7f37" if right else "#cf222e"
        draw.text(place, str(int(predicted[index])), fill=color, anchor="mm", font=font)
    return sheet
