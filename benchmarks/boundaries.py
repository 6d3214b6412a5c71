"""Kernels, and bytes at their boundaries, beside PyTorch's Inductor and tinygrad:
`python -m benchmarks.boundaries`.

Nothing runs and no GPU is needed: each compiler decides what becomes one kernel, and what it has
decided is counted. One rule for all: a launch is a kernel, and so is the call of a library; its
bytes are those of the tensors that it reads and writes, weights included, each once. Float16.

convloom gets the image in float32 as PyTorch has it, and its conversion is counted; the peers get
it in float16, Inductor channels last. Inductor generates for an H100 that need not be there
(`pretended.py`), its batch norms folded beforehand; with templates, all its convolutions and
products are Triton's, which can take epilogues in. tinygrad gets the network as ONNX, also folded;
without the package (the extra `peers`) it is left out.

Results go to benchmarks/results/boundaries.json, where what is not counted this time stays;
README.md has the summary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import convloom
import torch
from convloom.compiler.plan.plan import KernelStep
from convloom.kernels import registry

from . import inductor
from .machine_info import describe
from .peers import one_line

RESULTS = Path(__file__).resolve().parent / "results" / "boundaries.json"
MODELS = (
    "alexnet_torchvision", "vgg_d", "googlenet", "inception_v3", "resnet18", "resnet50",
    "resnext50_32x4d", "mobilenet_v1", "mobilenet_v2", "densenet121",
)  # fmt: skip
Count = tuple[int, int]
"""Kernels, and bytes."""


def ours(name: str, batch: int) -> Count:
    """Of convloom's plan."""
    module, x = inductor.example(name, batch)
    made = convloom.plan(module, (x,), target=inductor.TARGET, dtype=torch.float16).plan
    costs = (registry.get(s.op).cost(s.problem) for s in made.steps if isinstance(s, KernelStep))
    return len(made.kernels), sum(cost.size_bytes for cost in costs)


def theirs(contender: str) -> Callable[[str, int], Count]:
    """Of what Inductor would generate."""

    def count(name: str, batch: int) -> Count:
        from torch._inductor import ir, scheduler

        sizes: list[int] = []

        def note(graph: Any) -> None:
            for node in graph.nodes:
                is_none = isinstance(node, scheduler.NopKernelSchedulerNode)
                # A result of a call of several is no call of its own.
                if not is_none and not isinstance(node.node, ir.MultiOutput):
                    sizes.append(_boundary_bytes(node))
            original(graph)

        original = scheduler.Scheduler.codegen
        module, x = inductor.example(name, batch)
        module, _ = inductor.folded(module)
        with mock.patch.object(scheduler.Scheduler, "codegen", note):
            inductor.inductor(module, x.shape, "float16", contender, compiled=False)
        return len(sizes), sum(sizes)

    return count


def _boundary_bytes(node: Any) -> int:
    """Of the tensors that one of Inductor's kernels reads, and of those that it makes for others.
    Its own account leaves out a part of what templates read."""
    from torch._inductor import dependencies
    from torch._inductor.virtualized import V

    inside = {each.get_name() for each in node.get_nodes()}
    made = {buffer.get_name(): buffer for buffer in node.get_outputs()}
    touched = {
        dependency.name
        for dependency in node.read_writes.reads
        if not isinstance(dependency, dependencies.WeakDep)
    } - made.keys()
    for name, buffer in made.items():
        users = (user.node.get_name() for user in buffer.users if not user.is_weak)
        if not inside.issuperset(users):
            touched.add(name)
    graph = V.graph
    return sum(int(graph.get_numel(name)) * graph.get_dtype(name).itemsize for name in touched)


def tinygrads(name: str, batch: int) -> Count:
    """Of tinygrad's schedule. Raises: ModuleNotFoundError without it."""
    # Buffers of their own, and a device whose constants can be read; nothing is computed.
    os.environ |= {"DEV": "PYTHON", "NO_MEMORY_PLANNER": "1"}
    from tinygrad import Tensor, dtypes
    from tinygrad.nn.onnx import OnnxRunner
    from tinygrad.uop.ops import Ops

    module, x = inductor.example(name, batch)
    # Exporting runs the network, so a single image; the batch is a variable of the file.
    options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}, "dynamo": False}
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file, torch.no_grad():
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(module.half(), (x[:1].half(),), file.name, **options)
        network = OnnxRunner(file.name)
        for key, value in network.graph_values.items():
            # The values of weights decide nothing, and to read them would take kernels.
            if isinstance(value, Tensor) and dtypes.is_float(value.dtype) and value.numel() > 1:
                network.graph_values[key] = Tensor.empty(*value.shape, dtype=value.dtype)
        results = network({"x": Tensor.empty(*x.shape, dtype=dtypes.half)})
        first, *others = results.values()
        calls = [c for c in first.schedule_linear(*others).src if c.src[0].op is Ops.SINK]
    tensors = (each for call in calls for each in {*call.src[1:]})
    return len(calls), sum(each.dtype.itemsize * math.prod(each.shape) for each in tensors)


CONTENDERS: dict[str, Callable[[str, int], Count]] = {
    inductor.OURS: ours,
    "Inductor": theirs(inductor.LIBRARIES),
    "Inductor, all templates": theirs(inductor.FIRST),
    "tinygrad": tinygrads,
}


def measured(name: str, batch: int) -> dict[str, dict[str, Any]]:
    """The row of each contender that is installed, or why it has none."""
    rows: dict[str, dict[str, Any]] = {}
    for contender, count in CONTENDERS.items():
        try:
            kernels, size_bytes = count(name, batch)
        except Exception as error:  # anything another compiler may raise
            if contender == inductor.OURS:
                raise
            if not isinstance(error, ModuleNotFoundError):  # else what was counted before stays
                rows[contender] = {"impossible": one_line(error)}
        else:
            rows[contender] = {"kernels": kernels, "mb": round(size_bytes / 1e6, 1)}
    return rows


def summary(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A table of the peers, over all models: how many times ours, the median and the range."""
    lines = ["| beside convloom | kernels | bytes |", "|---|---|---|"]
    for contender in list(CONTENDERS)[1:]:
        cells = []
        for key in ("kernels", "mb"):
            pairs = [
                (row[contender][key], row[inductor.OURS][key])
                for row in rows.values()
                if key in row.get(contender, {})
            ]
            ratios = [one / other for one, other in pairs]
            cells.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                if ratios
                else "not counted"
            )
        lines.append(f"| {contender} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Counts, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = json.loads(options.output.read_text()) if options.output.exists() else {}
    try:
        version = metadata.version("tinygrad")
    except metadata.PackageNotFoundError:
        version = before.get("machine", {}).get("tinygrad", "not installed")
    about = {"machine": {**describe(), "tinygrad": version}, "batch": options.batch}
    known = before.get("rows", {})
    for name in options.models:
        known[name] = known.get(name, {}) | measured(name, options.batch)
        print(name, json.dumps(known[name]), flush=True)
        report = {**about, "target": inductor.TARGET, "rows": known}
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(summary(known)))


if __name__ == "__main__":
    main()
