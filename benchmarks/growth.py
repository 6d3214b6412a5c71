"""How compile time grows with the network: `python -m benchmarks.growth`.

Five shapes of network, each with N = 100, 300 and 1000 of what it has many of. What is timed is
everything between torch.export and the plan ("passes", "lowering"), and the account that `explain`
shows, in CPU seconds, which other work on the machine does not lengthen much. Beside them stands
how many times more the next size costs (of N log N: 3.7 times from 100 to 300, 4.0 times from 300
to 1000).

Results go to benchmarks/results/cpu/growth.json, under --label: "after" for this tree, "before" for
the commit that it is compared with, run on a checkout of that commit
(`PYTHONPATH=checkout python -m benchmarks.growth --label before`). Of that, 1000 siblings are left
out: they had not come to an end after 150 seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from convloom.compiler.explain.report import Report
from convloom.compiler.graph.ir import (
    INPUT,
    OUTPUT,
    CompileTarget,
    Graph,
    NoAttributes,
    Node,
    Value,
)
from convloom.compiler.passes import run_passes
from convloom.compiler.plan.lower import Options, lower
from convloom.kernels.contract import targets
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.movement.movement import Concat
from convloom.kernels.tile.conv_geometry import Conv2d

from .machine_info import describe

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "growth.json"
SIZES = (100, 300, 1000)
STEPS = ("passes", "lowering", "explain")
TARGET = "cuda:sm_90"
CHANNELS = 8
SIDE = 8


def input_graph(target: str) -> tuple[Graph, Value]:
    """A graph of nothing but an image."""
    graph = Graph(goal=CompileTarget(targets.parse(target), torch.float16))
    spec = TensorSpec((1, CHANNELS, SIDE, SIDE), torch.float32, Layout.NHWC)
    return graph, graph.insert(Node("x", INPUT, NoAttributes(), (spec,), origins=("x",)))


def captured(graph: Graph, name: str) -> None:
    """Marks a node as one that was captured under its own name."""
    graph.update(name, origins=(name,), module_path=name)


def op(graph: Graph, name: str, *inputs: Value, attributes: Concat | Conv2d | None = None) -> Value:
    """An application as capture makes them."""
    value = graph.add(name, inputs, attributes)
    captured(graph, value.node)
    return value


def conv(graph: Graph, x: Value, seed: int) -> Value:
    """A 1x1 convolution with a weight of its own."""
    shape = (CHANNELS, graph.spec(x).shape[1], 1, 1)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    constant = graph.add_constant(weight, "weight", torch.float32)
    return op(graph, "conv2d", x, constant, attributes=Conv2d())


def finish(graph: Graph, *values: Value) -> Graph:
    """The graph with its outputs."""
    graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), values)
    return graph


def siblings(count: int, target: str = TARGET) -> Graph:
    """`count` convolutions of one tensor, every second one rectified, joined."""
    graph, x = input_graph(target)
    ends = [conv(graph, x, seed) for seed in range(count)]
    ends = [op(graph, "relu", end) if at % 2 else end for at, end in enumerate(ends)]
    return finish(graph, op(graph, "concat", *ends, attributes=Concat(1)))


def long_concatenation(count: int, target: str = TARGET) -> Graph:
    """`count` branches of two pointwise functions with different operands, joined twice."""
    graph, x = input_graph(target)
    ends = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.randn(CHANNELS, 1, 1, generator=generator)
        scaled = op(graph, "mul", x, graph.add_constant(scale, "scale", torch.float32))
        ends.append(op(graph, "sigmoid", scaled))
    whole = op(graph, "concat", *ends, attributes=Concat(1))
    part = op(graph, "concat", *ends[count // 3 : -count // 3], attributes=Concat(1))
    return finish(graph, whole, part)


def dense_net(count: int, target: str = TARGET) -> Graph:
    """`count` layers in blocks of 50, each of which reads all the results of its block before it:
    the graph itself has 25 inputs for every layer."""
    graph, x = input_graph(target)
    joined = [x]
    for seed in range(count):
        if len(joined) == 50:
            joined = [conv(graph, op(graph, "concat", *joined, attributes=Concat(1)), -seed - 1)]
        source = op(graph, "concat", *joined, attributes=Concat(1)) if len(joined) > 1 else x
        joined.append(op(graph, "relu", conv(graph, source, seed)))
    return finish(graph, op(graph, "concat", *joined, attributes=Concat(1)))


def chain(count: int, target: str = TARGET) -> Graph:
    """`count` residual blocks: convolution, relu, convolution, addition, one after another."""
    graph, x = input_graph(target)
    for seed in range(count):
        inner = op(graph, "relu", conv(graph, x, 2 * seed))
        x = op(graph, "relu", op(graph, "add", conv(graph, inner, 2 * seed + 1), x))
    return finish(graph, x)


def many_outputs(count: int, target: str = TARGET) -> Graph:
    """A chain of `count` pooled stages, each of which is also returned through a head."""
    graph, x = input_graph(target)
    outputs = []
    for seed in range(count):
        x = op(graph, "relu", conv(graph, x, 2 * seed))
        outputs.append(op(graph, "sigmoid", conv(graph, x, 2 * seed + 1)))
    return finish(graph, x, *outputs)


SHAPES: dict[str, Callable[[int], Graph]] = {
    "many siblings": siblings,
    "long concatenation": long_concatenation,
    "DenseNet-like": dense_net,
    "residual chain": chain,
    "many outputs": many_outputs,
}


def measure(build: Callable[[int], Graph], count: int) -> dict[str, float]:
    """Seconds of each step for one network, in one run: what is slow shows by factors."""
    graph = build(count)
    ledger = Report()
    marks = [time.process_time()]
    optimised = run_passes(graph, ledger)
    marks.append(time.process_time())
    assert graph.goal is not None
    options = Options(graph.goal.target, dtype=graph.goal.dtype)
    ledger.plan = lower(optimised, graph, options, ledger)
    marks.append(time.process_time())
    ledger.to_text()
    marks.append(time.process_time())
    return {name: b - a for name, (a, b) in zip(STEPS, itertools.pairwise(marks), strict=True)}


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--label", default="after", choices=("before", "after"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    arguments = parser.parse_args()
    measure(chain, 2)
    times = {
        shape: {str(n): measure(SHAPES[shape], n) for n in arguments.sizes}
        for shape in arguments.shapes
    }
    show(times, arguments.sizes)
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report[arguments.label] = {
        "machine": describe(),
        "seconds": {
            shape: {n: {step: round(s, 3) for step, s in row.items()} for n, row in rows.items()}
            for shape, rows in times.items()
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def show(times: dict[str, dict[str, dict[str, float]]], sizes: Sequence[int]) -> None:
    """Prints seconds, and the growth from each size to the next."""
    for shape, rows in times.items():
        for step in STEPS:
            seconds = [rows[str(n)][step] for n in sizes]
            factors = [b / a for a, b in itertools.pairwise(seconds)]
            shown = "".join(f"{value:9.3f} s" for value in seconds)
            print(f"{shape:<20} {step:<9}{shown}   {' '.join(f'x{f:.1f}' for f in factors)}")


if __name__ == "__main__":
    main()
