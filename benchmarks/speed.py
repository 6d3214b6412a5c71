"""How long compiling, the interpreter and the emulator take: `python -m benchmarks.speed`.

Every figure is the median of several runs on this machine's CPU; nothing here says anything about a
GPU. Results go to benchmarks/results/cpu/speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import torch
from convloom import zoo
from convloom.compiler.capture.capture import capture
from convloom.compiler.graph.ir import CompileTarget
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes import run_passes
from convloom.compiler.plan.lower import Options, lower
from convloom.kernels.contract import targets

from .machine_info import describe

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "speed.json"
LIMITS_S = {
    "passes and lowering, resnet152": 5.0,
    "cross-compile resnet50 sm_90, cold": 90.0,
    "cross-compile resnet50 sm_90, warm": 5.0,
    "interpreter resnet18 224x224": 8.0,
    "interpreter resnet50 224x224": 15.0,
    "emulator resnet18 224x224 sm_90": 120.0,
}
CROSS_COMPILE = """
import time, torch, convloom
from convloom import zoo
if __name__ == "__main__":
    model, x = zoo.resnet50().eval(), torch.randn(8, 3, 224, 224)
    program = torch.export.export(model, (x,)).run_decompositions({})
    start = time.perf_counter()
    exported = torch.export.export(model, (x,)).run_decompositions({})
    export = time.perf_counter() - start
    start = time.perf_counter()
    exe = convloom.compile(model, (x,), target="cuda:sm_90", dtype=torch.float16)
    print(time.perf_counter() - start - export)
"""


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median wall-clock time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def example(name: str, batch: int = 1) -> tuple[torch.nn.Module, torch.Tensor]:
    """A seeded zoo model and an input of its native size."""
    torch.manual_seed(0)
    return zoo.build(name).eval(), torch.randn(batch, *zoo.entry(name).input_shape)


def passes_and_lowering(name: str) -> float:
    """Everything between torch.export and the plan, constants packed."""
    model, x = example(name)
    captured = capture(model, (x,))
    target = targets.INTERPRETER
    captured.goal = CompileTarget(target)

    def run() -> None:
        ledger = Ledger()
        lower(run_passes(captured, ledger), captured, Options(target), ledger)

    return seconds(run, 3)


def capture_beyond_export(name: str) -> float:
    """What `capture` costs besides torch.export itself."""
    model, x = example(name)
    whole = seconds(lambda: capture(model, (x,)), 3)
    export = seconds(lambda: torch.export.export(model, (x,)).run_decompositions({}), 3)
    return max(0.0, whole - export)


def cross_compile(cache: str) -> float:
    """ResNet-50, fp16, batch 8, in a fresh process, beyond torch.export."""
    with tempfile.TemporaryDirectory() as folder:
        # In a file, as a user's script would be.
        script = Path(folder) / "cross_compile.py"
        script.write_text(CROSS_COMPILE)
        environment = {**os.environ, "CONVLOOM_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def interpreter(name: str) -> float:
    """One image through the kernels in the interpreter."""
    model, x = example(name)
    exe = convloom.compile(model, (x,), target="interpreter")
    exe(x)
    return seconds(lambda: exe(x), 3)


def emulator(name: str) -> float:
    """One image through what the kernels are compiled to for sm_90 in fp16."""
    model, x = example(name)
    exe = convloom.compile(model, (x,), target="emulator:sm_90", dtype=torch.float16)
    return seconds(lambda: exe(x), 1)


def arena_ratio(name: str) -> float:
    """The activation arena over the sum of all activations."""
    model, x = example(name)
    counts = convloom.compile(model, (x,), target="interpreter").summary
    return counts["arena_bytes"] / counts["activation_bytes"]


def measure() -> dict[str, float]:
    """All figures, by name."""
    found = {
        "passes and lowering, resnet152": passes_and_lowering("resnet152")
        + capture_beyond_export("resnet152")
    }
    with tempfile.TemporaryDirectory() as cache:
        found["cross-compile resnet50 sm_90, cold"] = cross_compile(cache)
        found["cross-compile resnet50 sm_90, warm"] = cross_compile(cache)
    for name in ("resnet18", "resnet50"):
        found[f"interpreter {name} 224x224"] = interpreter(name)
    found["emulator resnet18 224x224 sm_90"] = emulator("resnet18")
    return found


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    found = measure()
    rows = {
        name: {"seconds": round(value, 2), "limit_seconds": LIMITS_S[name]}
        for name, value in found.items()
    }
    ratio = round(arena_ratio("resnet50"), 4)
    report = {"machine": describe(), "times": rows, "arena_over_activations": {"resnet50": ratio}}
    for name, row in rows.items():
        print(f"{name:<40} {row['seconds']:8.2f} s   (limit {row['limit_seconds']:.0f} s)")
    print(f"{'arena over activations, resnet50':<40} {ratio:8.1%}     (limit 25%)")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
