"""What `torch.compile(backend="convloom")` costs: time to compile, and host time per call.

    python -m benchmarks.torch_compile [NAME ...]

Compile times are CPU seconds of this process for the reference target: what another target takes
more is the same both ways. Host time per call is that of the backend alone (the check of the
weights and the choice of the executable), and of all that torch.compile puts around the executable:
guards, and the passing of weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import convloom
import torch
from convloom import zoo
from convloom.compiler.torch_compile import CompiledGraph, backend

NAMES = ("lenet5", "resnet18", "resnet50")
CALLS = 300


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def microseconds(function: Callable[[], Any]) -> float:
    """The median CPU time of a call."""
    times = sorted(cpu_seconds(function) for _ in range(CALLS))
    return times[CALLS // 2] * 1e6


def measure(name: str) -> str:
    """One line of figures."""
    model = zoo.build(name).eval()
    x = torch.zeros(1, *zoo.entry(name).input_shape)
    graphs: list[tuple[CompiledGraph, Sequence[Any]]] = []

    def noting(module: Any, examples: Sequence[Any]) -> Any:
        graph = backend(module, examples, options={"target": "reference"})
        assert isinstance(graph, CompiledGraph)

        def call(*arguments: Any) -> Any:
            graphs.append((graph, arguments))
            return graph(*arguments)

        return call

    with torch.no_grad():
        direct = cpu_seconds(lambda: convloom.compile(model, (x,), target="reference"))
        traced = cpu_seconds(lambda: torch.compile(model, backend="eager")(x))
        torch.compiler.reset()
        fast = torch.compile(model, backend=noting)
        door = cpu_seconds(lambda: fast(x)) - cpu_seconds(lambda: model(x))
        graph, arguments = graphs[0]
        (executable,) = convloom.executables()
        # From here on the network itself takes no time.
        results = executable._runner.run([x], 1)
        executable._runner.run = lambda tensors, batch: results  # type: ignore[method-assign]
        called = microseconds(lambda: executable(x))
        own, whole = microseconds(lambda: graph(*arguments)), microseconds(lambda: fast(x))
    return (
        f"{name}: compile {direct:.2f} s, by torch.compile {door:.2f} s (TorchDynamo alone "
        f"{traced:.2f} s); a call {called:.0f} us, by the backend {own - called:+.0f} us, by all "
        f"of torch.compile {whole - called:+.0f} us ({len(arguments) - 1} weights)"
    )


def main(names: Sequence[str]) -> int:
    """Prints a line per network."""
    measure("lenet5")  # What is imported and cached at the first use.
    for name in names or NAMES:
        torch.compiler.reset()
        print(measure(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
