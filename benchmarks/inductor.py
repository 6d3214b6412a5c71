"""What compiling costs beside PyTorch's Inductor, for an H100 that need not be there:
`python -m benchmarks.inductor`.

Cold compilation, each contender in a process of its own with empty caches: CPU seconds of that
process and of all it starts, from the module to machine code, beyond importing torch. Planning:
CPU seconds from the module to what is to be compiled (our plan, Inductor's source), after a first
small network, on every model of the zoo that both can do.

Inductor runs as it would on the device, as far as there can be none (`pretended.py`; what is left
out is printed, and makes it faster). Its batch norms are folded into the convolutions beforehand,
which is not counted, and it compiles in its own process, without workers to start.

Results join those in benchmarks/results/cpu/inductor.json; planned models, those of this commit.
Compare ratios only: they are of one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from convloom import zoo
from convloom.compiler.api import compile, lowered
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import pretended
from .machine_info import describe
from .options import DTYPES
from .peers import one_line

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "inductor.json"
TARGET = "cuda:sm_90"
OURS = "convloom"
LIBRARIES = "inductor, convolutions by libraries"
FIRST, LARGEST = "inductor, templates, first tile", "inductor, templates, largest tile"
CONTENDERS = (OURS, LIBRARIES, FIRST, LARGEST)
FOLDED = "batch norms folded beforehand"
WARM_UP = "lenet5"
CACHES = ("CONVLOOM_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
CHILD = """
import resource, sys

def seconds():
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)

if __name__ == "__main__":
    import torch
    marks = [seconds()]
    import triton
    marks.append(seconds())
    import convloom
    marks.append(seconds())
    from convloom.benchmarks import inductor
    inductor.child(sys.argv[1], marks)
"""
WATCH = """
import ctypes, json, os, resource, subprocess, sys

PR_SET_CHILD_SUBREAPER = 36  # Orphans of the child become ours: their time is not lost.
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
done = subprocess.run([sys.executable, "-c", *sys.argv[1:]])
try:
    while True:
        os.wait()
except ChildProcessError:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps(usage.ru_utime + usage.ru_stime))
sys.exit(done.returncode)
"""


def own_seconds() -> float:
    """CPU seconds of this process and what it has waited for."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


# In the child.


def child(work: str, marks: Sequence[float]) -> None:
    """Does one piece of work and prints what it was; `marks`: seconds at the start, behind the
    imports of torch, triton and convloom."""
    wanted = json.loads(work)
    kind = cold if "contender" in wanted else planning
    after_torch, after_triton, after_convloom = marks
    imports = {"triton": after_triton - after_torch, OURS: after_convloom - after_triton}
    print(json.dumps({"imports": imports, **kind(**wanted)}), flush=True)


def cold(contender: str, model: str, batch: int, dtype: str) -> dict[str, Any]:
    """Compiles one model; "start": the seconds used before."""
    module, x = example(model, batch)
    if contender == OURS:
        start = own_seconds()
        executable = compile(module, (x,), target=TARGET, dtype=as_dtype(dtype))
        return {"start": start, "kernels": len({k.request for k in executable.kernels})}
    module, notes = folded(module)
    start = own_seconds()
    configurations = inductor(module, x.shape, dtype, contender)
    return {
        "start": start,
        "kernels": len(configurations),
        "configurations": sum(configurations),
        "notes": notes,
    }


def planning(models: Sequence[str], batch: int, dtype: str, ours: bool) -> dict[str, Any]:
    """Seconds until there is a plan (or why not), by model; a small network goes first."""
    rows: dict[str, float | str] = {}
    for name in (WARM_UP, *models):
        module, x = example(name, batch)
        module = module if ours else folded(module)[0]
        start = own_seconds()
        try:
            if ours:
                lowered(module, (x,), target=TARGET, dtype=as_dtype(dtype), tuning="records")
            else:
                inductor(module, x.shape, dtype, LIBRARIES, compiled=False)
        except Exception as error:  # anything another compiler may raise
            if ours:
                raise
            rows[name] = one_line(error)
        else:
            rows[name] = own_seconds() - start
    return {"seconds": {name: rows[name] for name in models}}


def as_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def example(name: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """A seeded model of the zoo and an input."""
    torch.manual_seed(0)
    return zoo.build(name).eval(), torch.randn(batch, *zoo.entry(name).input_shape)


def folded(model: nn.Module) -> tuple[nn.Module, str]:
    """The model without its batch norms, as Inductor's own freezing would leave it: that needs the
    weights on the device. With a note of what was done."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(model), FOLDED
    except Exception as error:  # symbolic tracing follows no data-dependent Python
        return model, f"batch norms kept: {one_line(error)}"


def inductor(
    model: nn.Module, shape: Sequence[int], dtype: str, contender: str, compiled: bool = True
) -> list[int]:
    """Compiles as torch.compile would; the number of configurations of each kernel."""
    from torch._inductor import async_compile
    from torch._inductor.compile_fx import compile_fx

    configurations: list[int] = []

    def precompile(tuner: Any) -> None:
        configurations.append(len(tuner.configs))
        tuner._precompile_worker()

    options: dict[str, Any] = {
        "compile_threads": 1,
        "force_disable_caches": True,
        "shape_padding": False,
    }
    templates = contender in (FIRST, LARGEST)
    if templates:
        backends = ("max_autotune_gemm_backends", "max_autotune_conv_backends")
        options |= {"max_autotune": True} | dict.fromkeys(backends, "TRITON")

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        compile_fx(graph, inputs, config_patches=options)
        return lambda *arguments: graph(*arguments)

    torch._dynamo.reset()
    fake = FakeTensorMode()
    with fake:
        x = pretended.place(model, shape, as_dtype(dtype))
    with ExitStack() as stack:
        stack.enter_context(pretended.h100(precompile))
        if templates:
            stack.enter_context(pretended.one_candidate(largest=contender == LARGEST))
        if not compiled:
            replaced = mock.patch.object(async_compile.AsyncCompile, "triton", mock.Mock())
            stack.enter_context(replaced)
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake)
        torch.compile(model, backend=backend, fullgraph=True)(x)
    return configurations


# In the parent.


def spent(work: Mapping[str, Any]) -> dict[str, Any]:
    """What the child prints for a piece of work, with "total": CPU seconds of it and all it
    started.

    Raises: RuntimeError with the last line of what it wrote, where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / name.lower()) for name in CACHES}
        done = subprocess.run(
            [sys.executable, "-c", WATCH, CHILD, json.dumps(work)],
            env={**os.environ, **caches},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    *_, result, total = done.stdout.splitlines()
    return {**json.loads(result), "total": json.loads(total)}


def beyond_torch(contender: str, run: Mapping[str, Any]) -> float:
    """Seconds beyond importing torch and building the model. Everybody imports triton; what
    Inductor imports of torch later counts as its own, as convloom does as ours."""
    imports = run["imports"]
    own = imports[OURS] if contender == OURS else 0.0
    return float(run["total"] - run["start"] + imports["triton"] + own)


def measure_cold(model: str, batch: int, dtype: str) -> dict[str, dict[str, Any]]:
    """A row for every contender; a peer that cannot be measured says why."""
    rows: dict[str, dict[str, Any]] = {}
    for contender in CONTENDERS:
        work = {"contender": contender, "model": model, "batch": batch, "dtype": dtype}
        try:
            run = spent(work)
        except RuntimeError as error:
            if contender == OURS:
                raise
            rows[contender] = {"impossible": one_line(error)}
            continue
        kept = {k: run[k] for k in ("kernels", "configurations", "notes") if k in run}
        rows[contender] = {"cpu_seconds": round(beyond_torch(contender, run), 2), **kept}
    return rows


def measure_planning(models: Sequence[str], batch: int, dtype: str) -> dict[str, dict[str, Any]]:
    """Seconds of both by model, or why one of them has none."""
    work = {"models": list(models), "batch": batch, "dtype": dtype}
    ours, theirs = (spent({**work, "ours": ours})["seconds"] for ours in (True, False))
    rows = {}
    for name in models:
        both = {OURS: ours[name], "inductor": theirs[name]}
        rows[name] = {k: v if isinstance(v, str) else round(v, 2) for k, v in both.items()}
    return rows


def ratio(row: Mapping[str, Any], other: Mapping[str, Any], key: str = "cpu_seconds") -> str:
    """How many times the other's seconds a row needs."""
    if isinstance(row.get(key), float) and isinstance(other.get(key), float) and other[key]:
        return f"{row[key] / other[key]:.2f}"
    return "-"


def cold_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lines of one model: seconds, kernels, and ours over theirs."""
    lines = []
    for contender, row in rows.items():
        if "impossible" in row:
            lines.append(f"  {contender:<38} not possible here: {row['impossible']}")
            continue
        times = "" if contender == OURS else f"  ours / theirs {ratio(rows[OURS], row)}"
        kernels = f"{row['kernels']} kernels"
        if row.get("configurations", row["kernels"]) != row["kernels"]:
            kernels += f" in {row['configurations']} configurations"
        lines.append(f"  {contender:<38} {row['cpu_seconds']:7.2f} CPU s  {kernels}{times}")
    return "\n".join(lines)


def planning_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lines by model: our seconds, Inductor's, and ours over theirs; then who cannot do which."""
    lines, absent = [], []
    for name, row in rows.items():
        why = {k: v for k, v in row.items() if isinstance(v, str)}
        absent += [f"  {name}: {contender}: {reason}" for contender, reason in why.items()]
        if not why:
            part = row[OURS] / row["inductor"]
            lines.append(f"  {name:<22}{row[OURS]:7.2f} {row['inductor']:8.2f}   {part:.2f}")
    return "\n".join([*lines, *(["not both:", *absent] if absent else [])])


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cold", nargs="*", default=["resnet50"], metavar="MODEL")
    parser.add_argument("--plan", nargs="*", default=list(zoo.names()), metavar="MODEL")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    options = parser.parse_args()
    print("left out of Inductor's part: " + "; ".join(pretended.LEFT_OUT))
    report = json.loads(options.output.read_text()) if options.output.exists() else {}
    before = report.get("planning", {})
    report["left_out_of_inductor"] = list(pretended.LEFT_OUT)
    what = f"CPU seconds, {options.dtype}, batch {options.batch}, {TARGET}; no GPU"
    about = {"machine": describe(), "what": what}
    for name in options.cold:
        rows = measure_cold(name, options.batch, options.dtype)
        report.setdefault("cold", {})[name] = {**about, "rows": rows}
        print(f"cold compilation, {name}:\n{cold_table(rows)}", flush=True)
    if options.plan:
        rows = measure_planning(options.plan, options.batch, options.dtype)
        known = before["rows"] if before.items() >= about.items() else {}
        report["planning"] = {**about, "rows": known | rows}
        print(f"planning (convloom, inductor, ratio):\n{planning_table(rows)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
