"""Loaded kernels on this machine's GPU, through the CUDA driver: no compiler, no Triton.

What Triton's own launcher does (triton/backends/nvidia/driver.c, 3.6 and 3.7) is done here with
`cuda-bindings`: a module per cubin, the dynamic shared memory beyond 48 KB asked for, one
`cuLaunchKernelEx` per launch with attributes for clusters, programmatic and cooperative launches,
tensor maps of what is read in boxes, and two null pointers behind the arguments, where kernels
expect the compiler's scratch memory.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...errors import KernelError, TargetUnavailableError
from ...kernels.contract import targets
from ..graph.memory import Memory
from ..plan.streams import Action, Schedule, Touch, scheduled
from ..run.cuda_graphs import GraphRunner
from . import maps
from .check import PROMISE
from .program import READ, ROWS, Call, Image, Program
from .read import Artifact

STATIC_SHARED_BYTES = 48 * 1024
"""What a block may use without asking."""
WARP = 32


def cuda_driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises: TargetUnavailableError where it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise TargetUnavailableError(
            "loading kernels from a file needs the package cuda-bindings, which CUDA builds of "
            "torch 2.11 and newer bring with them: pip install cuda-bindings, in the version of "
            f"this machine's CUDA ({error})"
        ) from error


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """The result of a driver function.

    Raises: KernelError with the driver's name of the error.
    """
    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(f"CUDA driver: {name} failed with {getattr(status, 'name', status)}")
    return results[0] if results else None


def pick(artifact: Artifact, capability: int) -> tuple[tuple[Program, ...], bool]:
    """The programs for a GPU of that capability, and whether by their PTX.

    In this order: machine code of exactly this generation; of an older one of the same family
    (8.6 runs 8.0), unless it uses instructions of its own (sm_90a), which only the same generation
    has; PTX, which the driver compiles for anything newer.

    Raises: TargetUnavailableError listing what the file holds.
    """
    by_architecture: dict[int, list[Program]] = {}
    for program in artifact.programs:
        if program.calls:
            by_architecture.setdefault(program.architecture, []).append(program)
    older = sorted((each for each in by_architecture if each < capability), reverse=True)
    family = [e for e in older if e // 10 == capability // 10 and e < ARCHITECTURE_SPECIFIC]
    for architecture in (capability, *family):
        if architecture in by_architecture:
            return tuple(by_architecture[architecture]), False
    for architecture in older:
        programs = tuple(by_architecture[architecture])
        if all(image.ptx is not None for program in programs for image in program.images):
            return programs, True
    raise TargetUnavailableError(
        f"'{artifact.path}' has no kernels for this GPU, sm_{capability}; it holds "
        f"{artifact.holds()}. Save it for cuda:sm_{capability} too, or pass recompile=True to "
        "compile its graph here, which takes Triton and a while"
    )


ARCHITECTURE_SPECIFIC = 90
"""From Hopper on Triton compiles for the generation's own instructions."""


def load_kernels(
    driver: Any, program: Program, code: Callable[[str], bytes], by_ptx: bool
) -> tuple[Any, ...]:
    """The driver's function of every image of a program, on the current device.

    Raises: TargetUnavailableError where the device has less shared memory than a kernel needs,
    KernelError for what the driver refuses.
    """
    device = call(driver, "cuCtxGetDevice")
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    available = call(driver, "cuDeviceGetAttribute", attribute, device)
    modules: dict[str, Any] = {}
    attributes, functions = driver.CUfunction_attribute, []
    for image in program.images:
        if image.shared_bytes > available:
            raise TargetUnavailableError(
                f"kernel {image.entry} needs {image.shared_bytes:,} bytes of shared memory, this "
                f"GPU has {available:,}; save the executable for this GPU's own generation"
            )
        member, end = image.cubin, b""
        if by_ptx and image.ptx is not None:
            member, end = image.ptx, b"\0"  # The driver reads text up to a zero.
        if member not in modules:
            modules[member] = call(driver, "cuModuleLoadData", code(member) + end)
        function = call(driver, "cuModuleGetFunction", modules[member], image.entry.encode())
        if image.shared_bytes > STATIC_SHARED_BYTES:
            preference = driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED
            call(driver, "cuFuncSetCacheConfig", function, preference)
            size = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver, "cuFuncSetAttribute", function, size, image.shared_bytes)
        if image.num_ctas == 16:
            allowed = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            call(driver, "cuFuncSetAttribute", function, allowed, 1)
        functions.append(function)
    return tuple(functions)


def bind(
    driver: Any,
    program: Program,
    kernels: Sequence[Any],
    memory: Memory,
    stream: Callable[[], int],
) -> list[Action]:
    """One call without arguments per launch, in order; `stream` is asked at each. kernels: of
    `load_kernels`.

    Raises: KernelError for a buffer that is not aligned as kernels were compiled for.
    """
    actions: list[Action] = []
    for each in program.calls:
        image = program.images[each.image]
        config = driver.CUlaunchConfig()
        config.gridDimX = each.grid.programs_at(memory.batch) * image.num_ctas
        config.gridDimY = config.gridDimZ = 1
        config.blockDimX = WARP * image.num_warps
        config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes = image.shared_bytes
        config.attrs = attributes = _attributes(driver, image)
        config.numAttrs = len(attributes)
        passed = _arguments(driver, each, image, memory)
        action = partial(_launch, driver, config, kernels[each.image], passed, stream)
        actions.append((program.steps[each.step].name, action))
    return actions


def _arguments(driver: Any, each: Call, image: Image, memory: Memory) -> tuple[Any, list[Any]]:
    """The addresses of a launch's arguments, and the arguments, which must stay alive."""
    values: list[Any] = []
    for argument in each.arguments:
        if argument.kind == ROWS:
            values.append(ctypes.c_int32(each.grid.rows_at(memory.batch)))
            continue
        address = memory.flat(argument.buffer).data_ptr()
        if address % PROMISE:
            raise KernelError(
                f"{image.entry}: buffer {argument.buffer} is not aligned to {PROMISE} bytes"
            )
        if argument.map is not None:
            buffer = memory.flat(argument.buffer)
            values += maps.encoded(call, driver, argument.map, buffer, memory.batch)
        else:
            values.append(ctypes.c_uint64(address))
    # The compiler's global and profiling scratch: no kernel in a file uses them.
    values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]
    return (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)), values


def _launch(
    driver: Any, config: Any, function: Any, passed: tuple[Any, Any], stream: Callable[[], int]
) -> None:
    """passed: of `_arguments`."""
    config.hStream = driver.CUstream(stream())
    call(driver, "cuLaunchKernelEx", config, function, ctypes.addressof(passed[0]), 0)


def _attributes(driver: Any, image: Image) -> list[Any]:
    """What a launch asks for beyond its grid, as Triton's launcher does."""
    kinds = driver.CUlaunchAttributeID
    attributes = []

    def add(kind: Any) -> Any:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kind
        attributes.append(attribute)
        return attribute.value

    if image.programmatic:
        value = add(kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        value.programmaticStreamSerializationAllowed = 1
    if image.cooperative:
        add(kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE).cooperative = 1
    if image.num_ctas > 1:
        value = add(kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
        value.clusterDim.x = image.num_ctas
        value.clusterDim.y = value.clusterDim.z = 1
        value = add(kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE)
        spread = driver.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_SPREAD
        value.clusterSchedulingPolicyPreference = spread
    return attributes


def upload(
    program: Program, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """The packed constants of a program on a device; tensors that buffers share are there once."""
    names = dict.fromkeys(name for _, name in program.constants)
    copies = {name: tensors[name].to(device, copy=True) for name in names}
    return {buffer: copies[name] for buffer, name in program.constants}


def runner(artifact: Artifact, program: Program, by_ptx: bool) -> GraphRunner:
    """The program on this machine's GPU, one CUDA graph per batch that has been seen.

    Raises: TargetUnavailableError, KernelError.
    """
    driver = cuda_driver()
    device = torch.device("cuda", torch.cuda.current_device())
    # The first tensor makes torch's context the current one, which modules are loaded into.
    constants = upload(program, artifact.tensors, device)
    torch.cuda.current_stream()
    kernels = load_kernels(driver, program, artifact.code, by_ptx)

    def bind_here(memory: Memory) -> list[Action]:
        stream = torch.cuda.current_stream
        return bind(driver, program, kernels, memory, lambda: stream().cuda_stream)

    return GraphRunner(program, constants, bind_here, schedule_of(program))


def schedule_of(program: Program) -> Schedule | None:
    """How the streams of a program wait for each other, from what its launches touch; None where
    there is one. A file only says which step is in which stream: it cannot forget to wait."""
    touched: list[list[Touch]] = [[] for _ in program.steps]
    launches = [0] * len(program.steps)
    for each in program.calls:
        launches[each.step] += 1
        touched[each.step] += (
            Touch(argument.buffer, argument.kind != READ, argument.operand)
            for argument in each.arguments
            if argument.kind != ROWS
        )
    return scheduled(program.streams, touched, program.buffers, tuple(launches))


def capability_here(artifact: Artifact) -> int:
    """The compute capability of this machine's GPU, times ten.

    Raises: TargetUnavailableError where there is none.
    """
    capability = targets.local_capability()
    if capability is None:
        raise TargetUnavailableError(
            f"'{artifact.path}' holds {artifact.holds()}, and this machine has no usable NVIDIA "
            'GPU. Load it with device="interpreter" to run its network on the CPU'
        )
    return capability
