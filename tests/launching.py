"""Launches compiled kernels through Triton's own launcher, on `fake_libcuda.c` instead of a GPU.

A program of its own (`python -m tests.launching FOLDER`): the process that loads the driver that is
none must have no use for a real one. It prints what arrived there as JSON.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from convloom.compiler import api
from convloom.compiler.records import rank
from convloom.compiler.run import runtime
from convloom.kernels import registry
from convloom.kernels.contract import programmatic_launch, targets
from convloom.kernels.contract.op import Config, Launch, Problem, Ref
from convloom.kernels.devices import offline
from convloom.kernels.hopper import core
from torch import nn
from triton.runtime import driver

SOURCE = Path(__file__).with_name("fake_libcuda.c")
TARGET = targets.parse("cuda:sm_90")
STREAM = 77
SPACE = 1 << 20


class Launched(ctypes.Structure):
    """As in the C source."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("first_attribute", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("values", (ctypes.c_uint8 * 128) * 64),
    )


def built(folder: Path, compiler: str) -> Path:
    """The driver that is none, as a shared library in the folder."""
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler, "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
    return library


def installed(library: Path) -> ctypes.CDLL:
    """Loads it and makes it the driver of Triton's launcher."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    fake = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    fake.fake_last.restype = ctypes.POINTER(Launched)
    # What Triton's driver asks torch for, as a GPU of sm_90 answers it.
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    from triton.backends.nvidia.driver import CudaDriver

    active = CudaDriver()
    active.get_current_stream = lambda device: STREAM
    driver.set_active(active)
    return fake


def declared(ptx: str) -> list[int]:
    """Bytes of each argument of the kernel, as its code declares them."""
    head = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.S)
    assert head, ptx[:400]
    sizes = []
    for line in head[1].split("\n"):
        if found := re.search(r"\.param\s.*?\.b8\s+\w+\[(\d+)\]", line):
            sizes.append(int(found[1]))
        elif found := re.search(r"\.param\s+\.[a-z](\d+)", line):
            sizes.append(int(found[1]) // 8)
    return sizes


def expected(launch: Launch, tensor_of: Callable[[Ref], torch.Tensor], batch: int) -> list[Any]:
    """What the kernel must get, in its own order: addresses, the number of rows, and a box as its
    address, extents and size, followed by its shape and strides; then no scratch of Triton's."""
    found: list[Any] = []
    for name in launch.kernel.arg_names:
        if name in launch.pointers:
            found.append(tensor_of(launch.pointers[name]).data_ptr())
        elif name in launch.boxes:
            box = launch.boxes[name]
            base, shape = tensor_of(box.ref), box.shape_at(batch)
            address = base.data_ptr() + box.offset * base.element_size()
            found.append([address, list(shape[::-1])])
            found += [*shape, *box.strides]
        elif name == "extras":
            found += [tensor_of(ref).data_ptr() for ref in launch.extras]
        elif name == "m":
            found.append(launch.m_at(batch))
    return [*found, 0, 0]


def arrived(sizes: Sequence[int], last: Launched) -> list[Any]:
    """The arguments that the driver was given."""
    found: list[Any] = []
    for size, raw in zip(sizes, last.values, strict=False):
        data = bytes(raw)
        if size == 128:
            address, dims, _, *extents = struct.unpack("<8Q", data[:64])
            found.append([address, extents[:dims]])
        else:
            found.append(int.from_bytes(data[:size], "little"))
    return found


def launched(
    fake: ctypes.CDLL, launch: Launch, wanted: offline.CompileRequest, batch: int
) -> dict[str, Any]:
    """One launch: what it was to hand over, and what the driver got."""
    dtypes = {kind: dtype for dtype, kind in offline.POINTER_TYPES.items()}
    kinds = dict(wanted.pointers)
    refs = {ref: kinds[name] for name, ref in launch.pointers.items()}
    refs |= dict(zip(launch.extras, wanted.extras, strict=True))
    for name, box in launch.boxes.items():
        refs[box.ref] = "*" + kinds[name].removeprefix("tensordesc<").partition("[")[0]
    tensors = {ref: torch.empty(SPACE, dtype=dtypes[kind]) for ref, kind in refs.items()}
    compiled = offline.compile_request(wanted)
    sizes = declared(compiled.asm["ptx"])
    fake.fake_expect(len(sizes), (ctypes.c_uint32 * len(sizes))(*sizes))
    before = fake.fake_launches()
    runtime.bind_launch(launch, compiled, tensors.__getitem__, batch)()
    last = fake.fake_last().contents
    return {
        "kernel": wanted.name,
        "boxes": len(launch.boxes),
        "extras": len(launch.extras),
        "programmatic": programmatic_launch.is_programmatic(launch.constexprs),
        "launches": fake.fake_launches() - before,
        "expected": expected(launch, tensors.__getitem__, batch),
        "arrived": arrived(sizes, last),
        "grid": [list(launch.grid_at(batch)), list(last.grid)],
        "threads": [32 * compiled.metadata.num_warps, last.block[0]],
        "shared_bytes": [compiled.metadata.shared, last.shared_bytes],
        "attributes": [last.first_attribute] * last.attributes,
        "stream": last.stream,
    }


class Net(nn.Module):
    """Kernels with and without further operands, and a product split over programs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 128, 1)
        self.last = nn.Linear(128 * 14 * 14, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x) + x)))
        y = torch.nn.functional.max_pool2d(y, 2)
        return self.last(y.flatten(1))


def chosen(problem: Problem) -> Iterator[Config]:
    """The default, the first of the Hopper core's, and the first other one that reads boxes."""
    op = registry.get(problem.op)
    yield op.default(problem, TARGET)
    if problem.op in ("conv2d", "linear"):
        yield from itertools.islice(core.tiles(problem, TARGET), 1)
    for config in op.configs(problem, TARGET):
        if op.legal(problem, config, TARGET) is not None:
            continue
        if any(launch.boxes for launch in op.launches(problem, config, TARGET)):
            yield config
            return


def main(folder: str, compiler: str) -> None:
    """Launches a network's kernels: at its largest batch as they are, at a smaller one without
    waiting for the kernel before them, where they can."""
    torch.set_num_threads(1)
    fake = installed(built(Path(folder), compiler))
    example = torch.randn(8, 64, 28, 28)
    options: dict[str, Any] = {"target": TARGET.name, "dtype": torch.float16, "passes": "none"}
    _, plan, _ = api.lowered(Net().eval(), (example,), dynamic_batch=(1, 8), **options)
    answers = []
    for problem in dict.fromkeys(step.problem for step, _ in plan.kernels):
        op = registry.get(problem.op)
        for config in chosen(problem):
            for launch in op.launches(problem, config, TARGET):
                early = programmatic_launch.programmatic(launch, TARGET)
                for made, batch in ((launch, 8), (early, 3)):
                    (wanted,) = rank.requests(op, problem, (made,), TARGET)
                    answers.append(launched(fake, made, wanted, batch))
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
