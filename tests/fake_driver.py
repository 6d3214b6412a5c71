"""A CUDA driver that is none: it answers as `cuda.bindings.driver` does, writes down what it was
asked, and lets a test do on the CPU what a launch would have done."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

SUCCESS = SimpleNamespace(name="CUDA_SUCCESS")
FAILURE = SimpleNamespace(name="CUDA_ERROR_INVALID_IMAGE")


class _Names:
    """An enumeration whose members are their own names."""

    def __getattr__(self, name: str) -> str:
        return name


@dataclass(frozen=True)
class Started:
    """A launch: function, programs, threads, shared memory, attributes, stream, raw arguments."""

    entry: str
    programs: int
    threads: int
    shared_bytes: int
    attributes: tuple[tuple[str, Any], ...]
    stream: int
    arguments: tuple[Any, ...]
    scratch: tuple[int, int]


@dataclass
class FakeDriver:
    """signatures: the argument types of each function, by the code it was loaded from and its
    name. observe: called at every launch."""

    signatures: dict[tuple[bytes, str], tuple[str, ...]]
    shared_bytes: int = 232_448
    observe: Callable[[Started], None] = lambda started: None
    fail_at: str = ""
    loaded: list[bytes] = field(default_factory=list)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    maps: list[tuple[Any, ...]] = field(default_factory=list)
    version: int = 13_020

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS)
    CUdevice_attribute = CUfunction_attribute = CUfunc_cache = _Names()
    CUlaunchAttributeID = CUclusterSchedulingPolicy = _Names()
    CUstream = staticmethod(lambda handle: handle)
    CUlaunchConfig = SimpleNamespace

    @staticmethod
    def CUlaunchAttribute() -> SimpleNamespace:
        return SimpleNamespace(id=None, value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def _answer(self, name: str, *results: Any) -> tuple[Any, ...]:
        return (FAILURE,) if name == self.fail_at else (SUCCESS, *results)

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return self._answer("cuCtxGetDevice", 0)

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[Any, ...]:
        assert attribute == "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"
        return self._answer("cuDeviceGetAttribute", self.shared_bytes)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:
        self.loaded.append(code)
        return self._answer("cuModuleLoadData", len(self.loaded) - 1)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        return self._answer("cuModuleGetFunction", (module, name.decode()))

    def cuFuncSetCacheConfig(self, function: Any, wanted: str) -> tuple[Any, ...]:
        self.asked.append((function[1], wanted))
        return self._answer("cuFuncSetCacheConfig")

    def cuFuncSetAttribute(self, function: Any, attribute: str, value: int) -> tuple[Any, ...]:
        self.asked.append((function[1], attribute, value))
        return self._answer("cuFuncSetAttribute")

    cuuint32_t = cuuint64_t = int
    CUtensorMapDataType = CUtensorMapInterleave = CUtensorMapSwizzle = _Names()
    CUtensorMapL2promotion = CUtensorMapFloatOOBfill = _Names()

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return self._answer("cuDriverGetVersion", self.version)

    def cuTensorMapEncodeTiled(self, *arguments: Any) -> tuple[Any, ...]:
        """A map that begins with its number; the driver's bit for small tensors is set."""
        self.maps.append(arguments)
        raw = (ctypes.c_uint64 * 16)(len(self.maps) - 1, 1 << 21)
        made = SimpleNamespace(raw=raw, getPtr=lambda: ctypes.addressof(raw))
        return self._answer("cuTensorMapEncodeTiled", made)

    def _made_of(self, address: int) -> tuple[Any, ...]:
        """What a map that a kernel was given was made of, and whether the bit is set."""
        number, flags, *_ = (ctypes.c_uint64 * 16).from_address(address)
        return (*self.maps[number], bool(flags))

    def cuLaunchKernelEx(self, config: Any, function: Any, address: int, extra: int) -> Any:
        module, entry = function
        types = [x for each in self.signatures[self.loaded[module], entry] for x in expanded(each)]
        pointers = (ctypes.c_void_p * (len(types) + 2)).from_address(address)
        values = [
            self._made_of(at) if kind == "map"
            else (ctypes.c_int32 if kind == "i32" else ctypes.c_uint64).from_address(at).value
            for kind, at in zip((*types, "*", "*"), pointers, strict=True)
        ]  # fmt: skip
        assert (config.gridDimY, config.gridDimZ, config.blockDimY, config.blockDimZ) == (1,) * 4
        assert config.numAttrs == len(config.attrs) and extra == 0
        started = Started(
            entry,
            config.gridDimX,
            config.blockDimX,
            config.sharedMemBytes,
            tuple((each.id, _set(each.value)) for each in config.attrs),
            config.hStream,
            tuple(values[:-2]),
            (values[-2], values[-1]),
        )
        self.started.append(started)
        self.observe(started)
        return self._answer("cuLaunchKernelEx")


def _set(value: SimpleNamespace) -> dict[str, Any]:
    found = {name: each for name, each in vars(value).items() if name != "clusterDim"}
    cluster = vars(value.clusterDim)
    return {**found, **({"clusterDim": tuple(cluster.values())} if cluster else {})}


def expanded(kind: str) -> tuple[str, ...]:
    """An argument's kind as what is passed for it: of a tensor map its sizes and strides too."""
    if not kind.startswith("box"):
        return (kind,)
    dimensions = int(kind[3])
    return ("map", *("i32",) * dimensions, *("i64",) * dimensions)
