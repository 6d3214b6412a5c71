"""The demo's second part: ResNet-18 on a photograph, its errors layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import ConvloomError
from . import inputs, models, output

if TYPE_CHECKING:
    from rich.console import Console

    from ..compiler.run.executable import StepError

TITLE = "ResNet-18 on a photograph, held against float64"
PHOTO = "china.jpg"
ALLOWED = 8.0
"""How many times torch's own error ours may be: both add the same numbers in another order."""


def show(console: Console, folder: Path) -> dict[str, Any]:
    """Runs the photograph through the interpreted kernels and measures every layer's error.

    Raises: ConvloomError where scikit-learn or Pillow is missing.
    """
    import torch

    from ..compiler.api import compile
    from ..compiler.run import parity

    entry = zoo.entry("resnet18")
    x = inputs.image_tensor(_photo(), entry)
    model = models.build(entry.name)
    with output.working("compiling ResNet-18 for the interpreter"):
        executable = compile(model, (x,), target="interpreter")
    console.print(executable.summary_line())
    with output.working("running it: compiled, eager and in float64"):
        rows = executable.errors(x)
        with torch.no_grad():
            compiled = executable(x)
        truth = parity.truth_of_module(model, torch.float32)((x,))
    console.print(f"largest error of each step on {PHOTO}, relative to its output's rms")
    console.print(_table(rows))
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
    }  # fmt: skip


def _photo() -> Any:
    """scikit-learn's photograph of a Chinese temple, 640x427."""
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ConvloomError(
            f"the demo needs scikit-learn and Pillow ({error}): pip install 'convloom[demo]'"
        ) from error
    return Image.fromarray(load_sample_image(PHOTO))


def _table(rows: Sequence[StepError]) -> Any:
    from rich.table import Table

    table = Table("step", "module", "compiled", "eager")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row.step, row.module_path, f"{row.compiled:.1e}", f"{row.eager:.1e}")
    return table
