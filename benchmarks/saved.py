"""A file built without a GPU, loaded and run on one: the same bits as what is compiled there?

Builds in a process that sees no GPU, loads the file here through the driver, compares with the
executable that this process compiles, and times loading, the first call (which loads the kernels
and records the CUDA graph) and what the host needs to start a call.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import convloom
import torch
from convloom import zoo
from convloom.kernels.contract import targets
from torch import nn

from .devices import Device

CALLS = 200
SEED = 0
BUILD = """
import sys
from pathlib import Path
from convloom.benchmarks import saved
name, target, dtype, low, high, path = sys.argv[1:]
saved.build(name, target, dtype, (int(low), int(high)), Path(path))
"""


def model_of(name: str, most: int) -> tuple[nn.Module, torch.Tensor]:
    """The model with seeded weights, and seeded images: the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return zoo.build(name).eval(), torch.randn(most, *zoo.entry(name).input_shape)


def compiled(name: str, target: str, dtype: str, batches: tuple[int, int]) -> Any:
    """The executable for a range of batches, by the heuristic: alike in every process."""
    model, x = model_of(name, batches[1])
    return convloom.compile(
        model, (x,), target=target, dtype=getattr(torch, dtype), dynamic_batch=batches,
        tuning="heuristic",
    )  # fmt: skip


def build(name: str, target: str, dtype: str, batches: tuple[int, int], path: Path) -> None:
    """Compiles and saves, in a process that must not see a GPU."""
    if torch.cuda.is_available():
        raise RuntimeError("this process sees a GPU: it was to build without one")
    compiled(name, target, dtype, batches).save(path, model=name)


def build_apart(name: str, target: str, dtype: str, batches: tuple[int, int], path: Path) -> float:
    """`build` in a process without a GPU; seconds.

    Raises: RuntimeError with the end of what it said.
    """
    built_for = targets.parse(target).name
    arguments = [name, built_for, dtype, *map(str, batches), str(path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"building {name} failed: {done.stderr[-2_000:]}")
    return time.perf_counter() - start


def measure(
    name: str, target: str, dtype: str, batches: tuple[int, int], device: Device,
    calls: int = CALLS,
) -> dict[str, Any]:  # fmt: skip
    """What became of one model. equal: whether the outputs have the same bits, by batch; host_us:
    to start a call, of the loaded and of the compiled executable; load_s, first_call_s."""
    _, images = model_of(name, batches[1])
    images = images.to(device.place)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.loom"
        build_s = build_apart(name, target, dtype, batches, path)
        size_bytes = path.stat().st_size
        start = time.perf_counter()
        loaded = convloom.load(path, "cuda" if device.kind == "cuda" else "interpreter")
        load_s = time.perf_counter() - start
        first_call_s = _seconds(lambda: loaded(images[:1]), device)
    here = compiled(name, target, dtype, batches)
    sizes = dict.fromkeys(batches)
    return {
        "model": name, "dtype": dtype, "batches": list(batches), "file_bytes": size_bytes,
        "build_without_gpu_s": build_s, "load_s": load_s, "first_call_s": first_call_s,
        "equal": {
            str(batch): bool(torch.equal(loaded(images[:batch]), here(images[:batch])))
            for batch in sizes
        },
        "host_us": {
            which: {str(batch): _host_us(exe, images[:batch], device, calls) for batch in sizes}
            for which, exe in (("loaded", loaded), ("compiled", here))
        },
    }  # fmt: skip


def measure_all(
    names: Sequence[str], target: str, dtype: str, batches: tuple[int, int], device: Device,
    calls: int = CALLS,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each model; of what failed, why."""
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            rows.append(measure(name, target, dtype, batches, device, calls))
        except Exception as error:  # one model must not hide the others
            rows.append({"model": name, "failed": f"{type(error).__name__}: {error}"})
    return rows


def _seconds(work: Callable[[], Any], device: Device) -> float:
    start = time.perf_counter()
    work()
    if device.kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _host_us(exe: Any, x: torch.Tensor, device: Device, calls: int) -> float:
    """Median time until a call returns, which on a GPU is before it has run; the device is idle
    when it begins."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        exe(x)
        times.append((time.perf_counter() - start) * 1e6)
        if device.kind == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times)
