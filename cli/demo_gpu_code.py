"""The demo's third part: machine code for a GPU that need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from . import models, output
from .compile import kernel_table, summary_text

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "ResNet-50 in float16, batch 8, compiled for sm_90 without a GPU"
TARGET, BATCH = "cuda:sm_90", 8


def show(console: Console, folder: Path) -> dict[str, Any]:
    """Compiles ResNet-50 and prints what its kernels use of the chip."""
    import torch

    from ..compiler.api import compile

    entry = zoo.entry("resnet50")
    model = models.build(entry.name)
    example = torch.zeros(BATCH, *entry.input_shape)
    with output.working(f"compiling ResNet-50 for {TARGET} (the first time takes a minute)"):
        executable = compile(model, (example,), target=TARGET, dtype=torch.float16)
        table = kernel_table(executable)
    console.print(table)
    console.print(summary_text(executable))
    counts = executable.summary
    return {"as_expected": counts["torch_fallbacks"] == 0, "summary": counts}
