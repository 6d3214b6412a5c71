"""The demo's second part: ResNet-18 on a photograph, its errors layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import ConvloomError
from . import inputs, models, output

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..compiler.executable import StepError

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

    entry = zoo.entry("resnet18")
    x = inputs.image_tensor(_photo(), entry)
    model = models.build(entry.name)
    with output.working("compiling ResNet-18 for the interpreter"):
        executable = compile(model, (x,), target="interpreter")
    console.print(executable.summary_line())
    with output.working("running it: compiled, eager and in float64"):
        rows = executable.errors(x)
        with torch.no_grad():
            compiled, eager = executable(x), model(x)
            exact = copy.deepcopy(model).double()(x.double())
    console.print(f"largest error of each step on {PHOTO}, relative to its output's rms")
    console.print(_table(rows))
    ours, theirs = _error(compiled, exact), _error(eager, exact)
    best, expected = (y[0].topk(5).indices.tolist() for y in (compiled, eager))
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


def _error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error, relative to the rms of the exact output."""
    return ((y.double() - exact).abs().max() / exact.square().mean().sqrt()).item()


def _table(rows: Sequence[StepError]) -> Any:
    from rich.table import Table

    table = Table("step", "module", "compiled", "eager")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row.step, row.module_path, f"{row.compiled:.1e}", f"{row.eager:.1e}")
    return table
