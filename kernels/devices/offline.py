"""Compiles launches for any GPU generation, with no GPU at hand, and reads what came out.

A `CompileRequest` is everything the compiler needs, as picklable data; equal requests are one
kernel. Compilation goes through Triton's own cache (under CONVLOOM_CACHE_DIR), several requests at
once through worker processes. Reports are read from the machine code by the disassembler that ships
inside the triton package, and kept beside the cache.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from ... import progress, settings
from ...errors import KernelError, UnsafeKernelError
from ..contract.cost_model import Resources as Resources
from ..contract.epilogue import flat, named, resolved
from ..contract.op import Launch, Ref, Target, TmaDescriptor
from ..contract.programmatic_launch import is_programmatic
from ..hopper import gluon
from . import barriers
from .compile_cache import triton_cache, unwritable
from .entries import read_entry, write_entry
from .language import LANGUAGE
from .older_triton import help_compiler

POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
ALIGNED = [["tt.divisibility", 16]]
_IS_WORKER = False
"""Whether this process is one that compiles for another."""

help_compiler()


@dataclass(frozen=True)
class CompileRequest:
    """One kernel variant: function, argument types, compile-time constants, options, target.

    pointers: tensors by name, as pointers or as TMA descriptors of a box. constexprs: numbers,
    words, generated sources, names of functions, and tuples of those. cluster, cluster_bytes: as
    the launch has them.
    """

    kernel: str
    pointers: tuple[tuple[str, str], ...]
    extras: tuple[str, ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    capability: int
    cluster: int = 1
    cluster_bytes: int = 0

    @property
    def name(self) -> str:
        return self.kernel.rpartition(":")[2]


@dataclass(frozen=True)
class KernelReport(Resources):
    """What the compiler made of a request.

    instructions: SASS opcodes by count, memory opcodes with their width (`LDG.128`).
    """

    instructions: Mapping[str, int] = field(default_factory=dict)

    def count(self, prefix: str) -> int:
        """How many instructions start with the prefix."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))


def request(
    launch: Launch, dtype_of: Callable[[Ref], torch.dtype], target: Target
) -> CompileRequest:
    """The request behind a launch; `dtype_of` tells what each tensor argument points to."""
    function = launch.kernel.fn

    def pointer(ref: Ref) -> str:
        known = launch.scratch[ref.index].dtype if ref.kind == "scratch" else dtype_of(ref)
        return POINTER_TYPES[known]

    def descriptor(box: TmaDescriptor) -> str:
        known = pointer(box.ref).removeprefix("*")
        return gluon.descriptor_type(known, box.box, dtype_of(box.ref).itemsize)

    return CompileRequest(
        kernel=f"{function.__module__}:{function.__name__}",
        pointers=(
            *((name, pointer(ref)) for name, ref in launch.pointers.items()),
            *((name, descriptor(box)) for name, box in launch.boxes.items()),
        ),
        extras=tuple(pointer(ref) for ref in launch.extras),
        constexprs=tuple(sorted(named(launch.constexprs).items())),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        capability=target.capability,
        cluster=launch.cluster,
        cluster_bytes=launch.cluster_bytes,
    )


class _Source(ASTSource):  # type: ignore[misc]
    """A kernel whose constants may be tuples of functions: Triton hashes only their names."""

    def hash(self) -> str:
        held = flat({str(at): value for at, value in self.constants.items()}).values()
        keys = [value.cache_key for value in held if hasattr(value, "cache_key")]
        return hashlib.sha256(f"{super().hash()} {keys}".encode()).hexdigest()


class _GluonSource(_Source, gluon.GluonASTSource or ASTSource):  # type: ignore[misc]
    """A kernel in Gluon."""


def _kernel(wanted: CompileRequest) -> Any:
    module, _, name = wanted.kernel.partition(":")
    return getattr(importlib.import_module(module), name)


def _source(wanted: CompileRequest) -> ASTSource:
    kernel, name = _kernel(wanted), wanted.name
    names = list(kernel.arg_names)
    types: dict[str, Any] = dict(wanted.pointers)
    types["extras"] = wanted.extras
    types["m"] = "i32"
    constants = resolved(dict(wanted.constexprs))
    missing = [n for n in names if n not in types and n not in constants]
    if missing or len(types) + len(constants) != len(names):
        surplus = [n for n in (*types, *constants) if n not in names]
        raise KernelError(f"kernel {name}: missing arguments {missing}, unknown {surplus}")
    attributes: dict[tuple[int, ...], Any] = {
        (names.index(name),): ALIGNED for name, kind in wanted.pointers if kind.startswith("*")
    }
    at = names.index("extras")
    attributes |= {(at, index): ALIGNED for index in range(len(wanted.extras))}
    made = _GluonSource if gluon.is_gluon(kernel) else _Source
    return made(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs=attributes,
    )


def compile_request(wanted: CompileRequest) -> Any:
    """Triton's `CompiledKernel`.

    What is in Gluon is compiled in a process of its own first, which a bad shape may abort; it is
    then taken from the cache.

    Raises: KernelError naming the kernel, the target and the compiler's message.
    """
    if gluon.is_gluon(_kernel(wanted)) and not _IS_WORKER and known_resources(wanted) is None:
        _compile_apart(wanted)
    options: dict[str, Any] = {
        "num_warps": wanted.num_warps,
        "num_stages": wanted.num_stages,
        "enable_fp_fusion": True,  # Off by default from Triton 3.10 on.
    }
    if is_programmatic(dict(wanted.constexprs)):
        options["launch_pdl"] = True  # The launcher reads it from the compiled kernel.
    with LANGUAGE, triton_cache() as root, triton.knobs.compilation.scope():
        # The same machine code wherever the sources lie: what is saved must be reproducible.
        triton.knobs.compilation.disable_line_info = True
        try:
            compiled = triton.compile(
                _source(wanted), target=GPUTarget("cuda", wanted.capability, 32), options=options
            )
            check_tensor_memory(wanted, getattr(compiled.metadata, "tmem_size", 0))
            check_barriers(wanted, compiled.asm["ptx"])
            return in_cluster(compiled, wanted)
        except KernelError:
            raise
        except OSError as error:
            raise unwritable(root, error) from error
        except Exception as error:
            first = str(error).strip().splitlines() or [repr(error)]
            raise KernelError(
                f"kernel {wanted.name} does not compile for sm_{wanted.capability} with "
                f"{wanted.num_warps} warps, {wanted.num_stages} stages: {first[-1]} "
                f"(triton {triton.__version__})"
            ) from error


def in_cluster(compiled: Any, wanted: CompileRequest) -> Any:
    """The kernel, to be launched in clusters where that is wanted. Triton takes a cluster for one
    program that is spread over several multiprocessors, and compiles no exchange between them
    (3.7.1: "nvvm.mapa" is given a wrong address space); here each is a program of its own, so that
    only the launcher is told."""
    if wanted.cluster > 1:
        shared = compiled.metadata.shared + wanted.cluster_bytes
        compiled.metadata = compiled.metadata._replace(num_ctas=wanted.cluster, shared=shared)
        made_for = make_backend(compiled.metadata.target)
        compiled.packed_metadata = made_for.pack_metadata(compiled.metadata)
    return compiled


TENSOR_MEMORY = 512
"""Columns of tensor memory that a multiprocessor of sm_100 has."""


def check_tensor_memory(wanted: CompileRequest, columns: int) -> None:
    """Raises UnsafeKernelError for a kernel whose accumulators do not fit: Triton compiles it to
    one that does nothing."""
    if columns > TENSOR_MEMORY:
        raise UnsafeKernelError(
            f"kernel {wanted.name} needs {columns} columns of tensor memory on "
            f"sm_{wanted.capability}, which has {TENSOR_MEMORY}; use smaller tiles"
        )


WARPS_OF_A_PRODUCT = 4


def check_barriers(wanted: CompileRequest, ptx: str) -> None:
    """Raises UnsafeKernelError for a kernel in which one group of warps may overwrite what another
    one's products still read."""
    if wanted.num_warps <= WARPS_OF_A_PRODUCT:
        return
    if (write := barriers.unordered_write(ptx, 32 * wanted.num_warps)) is not None:
        raise UnsafeKernelError(
            f"kernel {wanted.name} for sm_{wanted.capability}, {wanted.num_warps} warps: no "
            f"barrier between {barriers.WAIT} and {write.split()[0]!r} (triton issue 11047, triton "
            f"{triton.__version__}); use {WARPS_OF_A_PRODUCT} warps"
        )


@lru_cache(maxsize=4096)
def report(request: CompileRequest) -> KernelReport:
    """Registers, spills, shared memory and instruction mix of the compiled kernel.

    Disassembling takes as long as compiling: who needs no instructions asks for `resources`. A
    report that is on disk is returned without compiling anything.
    """
    return _stored_or_made(KernelReport, request, _disassemble)


@lru_cache(maxsize=4096)
def resources(request: CompileRequest) -> Resources:
    """Registers, spills and shared memory; from disk where they are known, without compiling."""
    return _stored_or_made(Resources, request, _resources)


def known_resources(request: CompileRequest) -> Resources | None:
    """The resources where they, or a report, are on disk already; compiles nothing."""
    for kind in FOLDERS:
        if (stored := _stored(kind, _path_of(kind, request))) is not None:
            return Resources(stored.registers, stored.spill_bytes, stored.shared_bytes)
    return None


FOLDERS: Mapping[type[Resources], str] = {Resources: "resources", KernelReport: "reports"}
"""Where what is known of kernels lies in the cache folder, by kind."""
Kind = TypeVar("Kind", bound=Resources)


def _stored_or_made(kind: type[Kind], request: CompileRequest, make: Callable[[Any], Kind]) -> Kind:
    path = _path_of(kind, request)
    if (stored := _stored(kind, path)) is not None:
        return stored
    result = make(compile_request(request))
    write_entry(path, asdict(result))
    return result


def _path_of(kind: type[Resources], request: CompileRequest) -> Path:
    """Named by everything the machine code depends on, the sources of all functions included."""
    options = (request.num_warps, request.num_stages, request.capability, triton.__version__)
    key = hashlib.sha256(f"{_source(request).hash()} {options}".encode()).hexdigest()
    return settings.read().cache_dir / FOLDERS[kind] / f"{key}.json"


def _stored(kind: type[Kind], path: Path) -> Kind | None:
    """None where nothing is stored yet, or what a crash cut off."""
    data = read_entry(path)
    return None if data is None else kind(**data)


def disassembly(compiled: Any) -> str:
    """SASS text of a compiled kernel."""
    return disassembled(compiled.asm["cubin"], compiled.name)


def disassembled(cubin: bytes, name: str) -> str:
    """SASS text of the machine code of the kernel `name`."""
    return _run_on_cubin(cubin, name, "nvdisasm", "-c")


def _run_on_cubin(cubin: bytes, name: str, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        done = subprocess.run([path, option, file.name], capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{tool} failed on {name}: {done.stderr.strip()}")
    return done.stdout


def _resources(compiled: Any) -> Resources:
    cubin, name = compiled.asm["cubin"], compiled.name
    usage = _run_on_cubin(cubin, name, "cuobjdump", "-res-usage")
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert registers and stack, usage
    return Resources(int(registers[1]), int(stack[1]), compiled.metadata.shared)


def _disassemble(compiled: Any) -> KernelReport:
    counts = Counter(_opcodes(disassembly(compiled)))
    return KernelReport(**asdict(_resources(compiled)), instructions=dict(sorted(counts.items())))


MEMORY_OPCODES = ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDL", "STL")


def _opcodes(sass: str) -> Iterator[str]:
    """Opcodes without modifiers, except for the access width of memory instructions."""
    for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass):
        opcode, *modifiers = match[1].split(".")
        if opcode not in MEMORY_OPCODES:
            yield opcode
            continue
        width = next((m for m in modifiers if m in ("64", "128", "U8", "S8", "U16", "S16")), "32")
        yield f"{opcode}.{width}"


def compile_all(
    requests: Sequence[CompileRequest],
    workers: int | None = None,
    kind: type[Resources] = Resources,
) -> None:
    """Compiles the distinct requests that are not in the cache yet, in worker processes.

    kind: what will be asked of them later, and is read from the machine code at once.

    Raises: KernelError for the first request that does not compile.
    """
    read = report if kind is KernelReport else resources
    missing = [
        request
        for request in dict.fromkeys(requests)
        if _stored(kind, _path_of(kind, request)) is None
    ]
    workers = min(workers or os.cpu_count() or 1, len(missing))
    # The first workers of a process wait two seconds for torch: they must have enough to do.
    if workers < 2 or len(missing) < 4:
        for done, request in enumerate(missing, 1):
            read(request)
            progress.tell("kernels", done, len(missing))
        return
    try:
        with _pool(workers) as pool:
            for done, _ in enumerate(pool.map(read, missing), 1):
                progress.tell("kernels", done, len(missing))
    except BrokenProcessPool:
        if not any(gluon.is_gluon(_kernel(request)) for request in missing):
            raise
        for request in missing:  # Whoever aborted the process is named now.
            read(request)


def _compile_apart(wanted: CompileRequest) -> None:
    """Compiles a kernel into the cache in a process of its own.

    Raises: KernelError, also where the process ended.
    """
    try:
        with _pool(1) as pool:
            pool.submit(resources, wanted).result()
    except BrokenProcessPool as error:
        raise KernelError(
            f"kernel {wanted.name} does not compile for sm_{wanted.capability}: the compiler ended "
            f"its process (triton {triton.__version__}); choose another configuration, or set "
            "CONVLOOM_CORE=plain"
        ) from error


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that compile into the cache folder of the moment."""
    cache_dir = settings.read().cache_dir
    with (
        _blank_main(),
        ProcessPoolExecutor(
            workers, mp_context=_fork_server(), initializer=_prepare_worker, initargs=(cache_dir,)
        ) as pool,
    ):
        yield pool


def _fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts workers that have imported this room already, once for all of them: a process of its
    own does, of which they are forks. It ends with this process."""
    context = multiprocessing.get_context("forkserver")
    registry = f"{__name__.rsplit('.', 2)[0]}.registry"
    context.set_forkserver_preload([__name__, registry])
    return context


def _prepare_worker(cache_dir: Path) -> None:
    """In the worker, whose environment is that in which the first one was started."""
    global _IS_WORKER
    _IS_WORKER = True
    os.environ["CONVLOOM_CACHE_DIR"] = str(cache_dir)
    torch.set_num_threads(1)
    gc.freeze()  # What torch and triton hold is not worth looking through again and again.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _blank_main() -> Iterator[None]:
    """Workers import the main module: a script without a `__main__` guard would run again.

    Nothing that is sent to them lives there.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
