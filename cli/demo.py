"""`convloom demo`: real networks compiled, explained, run and checked, in four parts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .. import zoo
from ..errors import ConvloomError, InvalidInputError, near_names
from . import inputs, networks, output
from . import options as shared
from .compile import kernel_table, summary_text

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from rich.console import Console

    Part = Callable[[Console, Path], dict[str, Any]]

DIGITS_BATCH, GPU_BATCH, EMULATED_BATCH = 64, 8, 16
GPU, EMULATED = "cuda:sm_90", "emulator:sm_90"
GRID = (5, 12)
"""Rows and columns of the picture."""
CELL, CAPTION = 64, 18
PHOTO = "china.jpg"
ALLOWED = 8.0
"""How many times torch's own error ours may be: both add the same numbers in another order."""


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "demo", help="compile, run and check real networks (about two minutes)",
        description="digits: LeNet-5 reads handwritten digits. photo: ResNet-18 on a photograph, "
        "its errors layer by layer. gpu-code: ResNet-50 for an H100, with no GPU here. emulator: "
        "LeNet-5 as an H100 would run it.",
    )
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"),
                        help="where the picture goes (default: ./demo-output)")


def run(options: argparse.Namespace) -> int:
    """Runs the parts; the exit status is 1 when a result is not what it must be."""
    for name in options.parts:
        if name not in PARTS:
            raise InvalidInputError(f"unknown part {name!r} of the demo; {near_names(name, PARTS)}")
    console = output.console(stderr=options.json)
    results: dict[str, Any] = {}
    started = time.perf_counter()
    for name in options.parts or PARTS:
        title, show = PARTS[name]
        console.rule(f"{name}: {title}")
        results[name] = show(console, options.output_dir)
    seconds = time.perf_counter() - started
    console.rule(f"done in {seconds:.0f} s")
    if options.json:
        output.print_json({"parts": results, "seconds": seconds})
    return 0 if all(result["as_expected"] for result in results.values()) else 1


@contextmanager
def _needing(what: str) -> Iterator[None]:
    """Raises: ConvloomError where a library of the demo is missing."""
    try:
        yield
    except ImportError as error:
        raise ConvloomError(
            f"the demo needs {what}, which is not installed ({error}): "
            "pip install scikit-learn pillow"
        ) from error


# Digits.


def show_digits(console: Console, folder: Path) -> dict[str, Any]:
    """Classifies the whole held-out split with torch and with the executable, and compares."""
    with _needing("Pillow"):
        import PIL  # noqa: F401
    from ..compiler.api import compile
    from ..zoo.digits import load_digits_split

    split = load_digits_split()
    images, labels = split.test_images, split.test_labels
    model = networks.zoo_model("lenet5", "digits")
    target = shared.default_target()
    with output.working(f"compiling LeNet-5 for {target}, any batch up to {DIGITS_BATCH}"):
        executable = compile(
            model, (images[:2],), target=target, dynamic_batch=(1, DIGITS_BATCH)
        )
    console.print(f"{target}: {executable.summary_line()}")
    started = time.perf_counter()
    compiled = _in_batches(lambda x: networks.run(executable, x), images)
    seconds = time.perf_counter() - started
    eager = _in_batches(model, images)
    predicted, expected = compiled.argmax(1), eager.argmax(1)
    agree = int((predicted == expected).sum())
    answers = {"compiled": predicted, "eager": expected}
    accuracy = {name: (it == labels).double().mean().item() for name, it in answers.items()}
    console.print(
        f"{len(images)} held-out scans in batches of {DIGITS_BATCH}: {seconds:.1f} s\n"
        f"top-1 eager {accuracy['eager']:.2%}, compiled {accuracy['compiled']:.2%}; "
        f"the same answer for {agree} of {len(images)} images, "
        f"largest difference of a score {(compiled - eager).abs().max().item():.1e}"
    )
    path = folder / "digits.png"
    output.write_file(path, lambda file: _save_grid(file, images, predicted, labels))
    console.print(f"picture of {GRID[0] * GRID[1]} scans with our answers: {path}", markup=False)
    return {
        "as_expected": agree == len(images),
        "target": target,
        "images": len(images),
        "agreeing": agree,
        "top1": accuracy,
        "picture": str(path),
    }


def _in_batches(network: Any, images: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([network(x) for x in torch.split(images, DIGITS_BATCH)])


def _save_grid(
    file: IO[bytes], images: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor
) -> None:
    """Writes the first scans with their predicted labels below as PNG, red where the label says
    otherwise.

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
        color = "#1a7f37" if predicted[index] == labels[index] else "#cf222e"
        place = (left + CELL // 2, top + CELL + CAPTION // 2 - 2)
        draw.text(place, str(int(predicted[index])), fill=color, anchor="mm", font=font)
    sheet.save(file, format="PNG")


# A photograph.


def show_photo(console: Console, folder: Path) -> dict[str, Any]:
    """Runs the photograph through the interpreted kernels and measures every layer's error."""
    import torch

    from ..compiler.api import compile
    from ..compiler.run import parity

    entry = zoo.entry("resnet18")
    x = inputs.image_tensor(_photo(), entry)
    model = networks.zoo_model(entry.name)
    with output.working("compiling ResNet-18 for the interpreter"):
        executable = compile(model, (x,), target="interpreter")
    console.print(executable.summary_line())
    with output.working("running it: compiled, eager and in float64"):
        rows = executable.errors(x)
        with torch.no_grad():
            compiled = executable(x)
        truth = parity.truth_of_module(model, torch.float32)((x,))
    console.print(f"largest error of each step on {PHOTO}, relative to its output's rms")
    cells = [(r.step, r.module_path, f"{r.compiled:.1e}", f"{r.eager:.1e}") for r in rows]
    console.print(output.table(("step", "module", ">compiled", ">eager"), cells))
    depth = parity.depth_of(executable.graph)
    (result,) = parity.parity(("scores",), [compiled], truth, torch.float32, depth)
    ours, theirs = result.compiled, result.eager
    best, expected = (y[0].topk(5).indices.tolist() for y in (compiled, truth[1][0]))
    console.print(
        f"final error against float64: compiled {ours:.1e}, eager {theirs:.1e}\n"
        "five highest scores (seeded weights, so the classes mean nothing):\n"
        f"compiled {best}\n   eager {expected}",
        markup=False,
    )
    return {
        "as_expected": ours <= ALLOWED * theirs,
        "error": {"compiled": ours, "eager": theirs},
        "top5": {"compiled": best, "eager": expected},
        "steps": [
            {"step": row.step, "module": row.module_path, "compiled": row.compiled,
             "eager": row.eager}
            for row in rows
        ],
    }


def _photo() -> Image:
    """scikit-learn's photograph of a Chinese temple, 640x427."""
    with _needing("scikit-learn and Pillow"):
        from PIL import Image
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(PHOTO))


# Code for a GPU, and what it would do.


def show_gpu_code(console: Console, folder: Path) -> dict[str, Any]:
    """Compiles ResNet-50 and prints what its kernels use of the chip."""
    import torch

    from ..compiler.api import compile

    model = networks.zoo_model("resnet50")
    example = torch.zeros(GPU_BATCH, *zoo.entry("resnet50").input_shape)
    with output.working(f"compiling ResNet-50 for {GPU} (the first time takes a minute)"):
        executable = compile(model, (example,), target=GPU, dtype=torch.float16)
        table = kernel_table(executable)
    console.print(table)
    console.print(summary_text(executable))
    counts = executable.summary
    return {"as_expected": counts["torch_fallbacks"] == 0, "summary": counts}


def show_emulator(console: Console, folder: Path) -> dict[str, Any]:
    """Reads digits by compiled code, and compares with torch."""
    import torch

    from ..compiler.api import compile
    from ..zoo.digits import load_digits_split

    images = load_digits_split().test_images[:EMULATED_BATCH]
    model = networks.zoo_model("lenet5", "digits")
    with output.working(f"compiling LeNet-5 for {EMULATED}"):
        executable = compile(model, (images,), target=EMULATED, dtype=torch.float16)
    started = time.perf_counter()
    compiled = executable(images)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        eager = model(images)
    agree = int((compiled.argmax(1) == eager.argmax(1)).sum())
    instructions = sum(kernel.ptx().count(";") for kernel in executable.kernels)
    console.print(
        f"{len(executable.kernels)} kernels, about {instructions:,} instructions of PTX, "
        f"{len(images)} scans in {seconds:.1f} s: no race, no access outside a tensor\n"
        f"the same answer as PyTorch in float32 for {agree} of {len(images)} scans, largest "
        f"difference of a score {(compiled - eager).abs().max().item():.1e}"
    )
    return {"as_expected": agree == len(images), "images": len(images), "agreeing": agree}


PARTS: dict[str, tuple[str, Part]] = {
    "digits": ("LeNet-5 reads handwritten digits", show_digits),
    "photo": ("ResNet-18 on a photograph, held against float64", show_photo),
    "gpu-code": (
        f"ResNet-50 in float16, batch {GPU_BATCH}, compiled for sm_90 without a GPU", show_gpu_code
    ),
    "emulator": ("LeNet-5 in float16, compiled for sm_90 and emulated on the CPU", show_emulator),
}
