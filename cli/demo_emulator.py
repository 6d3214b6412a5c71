"""The demo's fourth part: what a GPU would run, run without one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import models, output

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "LeNet-5 in float16, compiled for sm_90 and emulated on the CPU"
TARGET, BATCH = "emulator:sm_90", 16


def show(console: Console, folder: Path) -> dict[str, Any]:
    """Reads digits by compiled code, and compares with torch.

    Raises: ConvloomError where scikit-learn is missing.
    """
    import torch

    from ..compiler.api import compile
    from ..zoo.digits import load_digits_split

    images = load_digits_split().test_images[:BATCH]
    model = models.build("lenet5", weights="digits")
    with output.working(f"compiling LeNet-5 for {TARGET}"):
        executable = compile(model, (images,), target=TARGET, dtype=torch.float16)
    started = time.perf_counter()
    compiled = executable(images)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        eager = model(images)
    agree = int((compiled.argmax(1) == eager.argmax(1)).sum())
    off = (compiled - eager).abs().max().item()
    instructions = sum(kernel.ptx().count(";") for kernel in executable.kernels)
    console.print(
        f"{len(executable.kernels)} kernels, about {instructions:,} instructions of PTX, "
        f"{len(images)} scans in {seconds:.1f} s: no race, no access outside a tensor\n"
        f"the same answer as PyTorch in float32 for {agree} of {len(images)} scans, largest "
        f"difference of a score {off:.1e}"
    )
    return {"as_expected": agree == len(images), "images": len(images), "agreeing": agree}
