"""`python -m tests.gpu_sample cuda conv2d softmax`: one draw of each op in half precision, for a
tool that watches a whole process (compute-sanitizer). Says what it ran; fails as the check does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from convloom.kernels.contract import targets

from . import gpu_checks, gpu_stress
from .gpu_device import Gpu, Rehearsed

ROOT = Path(__file__).resolve().parent.parent
REFUSAL = "Device not supported"
"""What compute-sanitizer says on machines that hide their GPU's debugger."""
SPLIT = "split"
"""Stands for a product whose sums are shared among programs."""
OPS = (
    "conv2d", "linear", SPLIT, "separable", "max_pool2d", "conv_pool", "softmax", "head",
    "normalize", "concat", "stem",
)  # fmt: skip
"""One of each kind of kernel: loops over taps, semaphores, windows, reductions, copies."""


def run(device: Gpu, name: str) -> None:
    """One draw of the op by its default configuration."""
    if name != SPLIT:
        gpu_checks.check_op(device, name, "float16", count=1, tiles=False)
        return
    layer = gpu_stress.SMALL_SPLIT
    gpu_stress.check_repeatable(device, layer, gpu_checks.dtype_of("float16"), times=2, most=1)


def watched(program: str, tool: str, where: str, name: str) -> str | None:
    """Runs the sample of one op under a tool of compute-sanitizer; why it refuses to, or None.

    The same is run without it first: that compiles, and shows what is not the tool's doing.
    """
    sample = [sys.executable, "-m", "tests.gpu_sample", where, name]
    # Each allocation by itself: inside PyTorch's own pool nothing is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = ""
    for command in (sample, [program, "--tool", tool, "--error-exitcode", "99", *sample]):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if REFUSAL in said:
            return said[-300:]
        assert done.returncode == 0, f"{' '.join(command)}: {said[-3_000:]}"
    assert f"{name}: right" in said, said[-3_000:]
    return None


def main(arguments: Sequence[str]) -> None:
    """Runs the ops of the arguments, after the device."""
    where, *names = arguments
    device = Gpu() if where == "cuda" else Rehearsed(targets.parse(where))
    for name in names or OPS:
        run(device, name)
        print(f"{name}: right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
