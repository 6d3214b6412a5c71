"""What `torch.compile(backend="convloom")` costs: time to compile, and host time per call.

    python -m benchmarks.torch_compile [NAME ...]

Compile times are CPU seconds of this process for the reference target: what another target takes
more is the same both ways. TorchDynamo's are those of any backend: its tracing, and in a call its
guards and the passing of every weight to a function that calls the executable. Ours looks at them.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import convloom
import torch
from convloom import zoo
from convloom.compiler.torch_compile import backend

NAMES = ("lenet5", "resnet18", "resnet50")
CALLS, BLOCKS = 10, 300


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def microseconds(function: Callable[[], Any]) -> float:
    """The CPU time of a call, in the fastest of many short blocks of calls."""
    timer = timeit.Timer(function, timer=time.process_time)
    return min(timer.repeat(BLOCKS, CALLS)) / CALLS * 1e6


def measure(name: str) -> str:
    """One line of figures."""
    model = zoo.build(name).eval()
    x = torch.zeros(1, *zoo.entry(name).input_shape)
    graphs: list[tuple[Any, Sequence[Any]]] = []

    def noting(module: Any, examples: Sequence[Any]) -> Any:
        graph = backend(module, examples, options={"target": "reference"})

        def call(*arguments: Any) -> Any:
            graphs.append((graph, arguments))
            return results

        return call

    with torch.no_grad():
        direct = cpu_seconds(lambda: convloom.compile(model, (x,), target="reference"))
        traced = cpu_seconds(lambda: torch.compile(model, backend="eager")(x))
        torch.compiler.reset()
        results = (model(x),)
        door = cpu_seconds(lambda: torch.compile(model, backend=noting)(x))
        (graph, arguments), (executable,) = graphs[0], convloom.executables()
        # From here on the network itself takes no time.
        executable._runner.run = lambda tensors, batch: list(results)  # type: ignore[method-assign]
        called = microseconds(lambda: executable(x))
        calls = []
        trusting = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        for each, checks, options in (
            (graph, True, None),
            (graph, False, None),
            (graph, False, trusting),
            (lambda *_: executable(x), True, None),
        ):
            torch.compiler.reset()
            graph._checks = checks
            made = torch.compile(model, backend=lambda *_, call=each: call, options=options)
            calls.append(microseconds(partial(made, x)))
        whole, unchecked, trusted, torchs = calls
    return (
        f"{name}: compile {direct:.2f} s, by torch.compile {door:.2f} s, of which TorchDynamo "
        f"{traced:.2f} s; a call {called:.0f} us, by torch.compile {whole - called:+.0f} us, of "
        f"which TorchDynamo {torchs - called:.0f} us and the backend {whole - torchs:.0f} us, with "
        f"check_weights=False {unchecked - torchs:.0f} us; without guards on modules as well "
        f"{trusted - called:+.0f} us ({len(arguments) - 1} weights)"
    )


def main(names: Sequence[str]) -> int:
    """Prints a line per network."""
    measure("lenet5")  # What is imported and cached at the first use.
    for name in names or NAMES:
        print(measure(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
