"""A GPU that is not there: tensors of the CPU that say they lie on "cuda", and kernels that are
interpreted where machine code would run.

What runs on it is the code that runs on a GPU: where tensors lie is checked at every call of torch,
as PyTorch does, and `torch.cuda` is `FakeCuda`'s. What it cannot show is what a GPU computes.

`python -m pytest -p tests.fake_gpu -m gpu tests/test_gpu.py` has one from beginning to end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from convloom.compiler.capture import capture
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract import programmatic_launch
from convloom.kernels.devices import interpreter, offline
from convloom.kernels.devices.offline import CompileRequest, Resources
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .fake_cuda import FakeCuda

PLACE = torch.device("cuda", 0)
MOVES = frozenset(("copy_", "__set__", "set_", "_has_compatible_shallow_copy_type"))
"""Functions whose arguments may lie anywhere; so may the indices of __getitem__ and __setitem__."""
SAME = "Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu"


class FakePlaces(TorchFunctionMode):
    """Knows which storages lie on the GPU, and refuses what PyTorch refuses."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, Any] = {}
        self._paused = False

    def is_there(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on the GPU."""
        return self._storage(tensor)[0] in self._there

    def _storage(self, tensor: torch.Tensor) -> tuple[int, Any]:
        storage = tensor.untyped_storage()
        return storage._cdata, storage

    def put(self, tensor: torch.Tensor) -> None:
        """The tensor's storage lies on the GPU from now on."""
        key, storage = self._storage(tensor)
        self._there[key] = storage  # Kept, so that no other one gets its address.

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._paused:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return self._property(function, args, kwargs)
        if name in ("to", "cuda", "cpu") and isinstance(args[0], torch.Tensor):
            return self._move(function, name, args, kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = self._place_of_all(name, tensors)
        if name in ("numpy", "__array__", "tolist") and there and name != "tolist":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        asked = kwargs.get("device")
        if asked is not None:
            there = torch.device(asked).type == "cuda"
            kwargs["device"] = torch.device("cpu") if there else asked
        result = function(*args, **kwargs)
        if there:
            self._put_all(result)
        return result

    def _property(self, function: Any, args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, torch.device) and result.type == "cpu" and self.is_there(args[0]):
            return PLACE
        if isinstance(result, bool) and function == torch.Tensor.is_cuda.__get__:
            return self.is_there(args[0])
        return result

    def _place_of_all(self, name: str, tensors: list[torch.Tensor]) -> bool:
        if name in MOVES:
            return False
        if name in ("__getitem__", "__setitem__"):
            return bool(tensors) and self.is_there(tensors[0])
        places = {self.is_there(tensor) for tensor in tensors if tensor.dim() > 0}
        if len(places) > 1:
            raise RuntimeError(f"{SAME}! ({name})")
        return any(self.is_there(tensor) for tensor in tensors)

    def _move(self, function: Any, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        source = args[0]
        goal = self.is_there(source)
        rest: list[Any] = []
        for arg in args[1:]:
            if isinstance(arg, (str, torch.device)):
                goal = torch.device(arg).type == "cuda"
            elif isinstance(arg, torch.Tensor):
                goal, rest = self.is_there(arg), [arg.dtype]
            elif isinstance(arg, torch.dtype):
                rest = [arg]
        if (asked := kwargs.pop("device", None)) is not None:
            goal = torch.device(asked).type == "cuda"
        if name in ("cuda", "cpu"):
            goal, rest, kwargs = name == "cuda", [], {}
        kwargs.pop("non_blocking", None)
        result: torch.Tensor = source
        if rest or kwargs:
            result = source.to(*rest, **kwargs)
        if goal != self.is_there(source):
            if self._storage(result)[0] == self._storage(source)[0]:
                result = result.clone(memory_format=torch.preserve_format)
            if goal:
                self.put(result)
        elif goal:
            self.put(result)
        return result

    def exporting(self, export: Callable[..., Any]) -> Callable[..., Any]:
        """torch.export, which cannot imagine a GPU in a PyTorch without CUDA: what it is given is
        checked, and lies on the CPU while it runs."""

        def checked(module: Any, arguments: Any, *others: Any) -> Any:
            tensors = [*module.parameters(), *module.buffers(), *pytree.tree_leaves(arguments)]
            if len({self.is_there(tensor) for tensor in tensors}) > 1:
                raise RuntimeError("Unhandled FakeTensor Device Propagation, cuda:0 and cpu")
            self._paused = True
            try:
                return export(module, arguments, *others)
            finally:
                self._paused = False

        return checked

    def _put_all(self, result: Any) -> None:
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.put(leaf)


class Kernel:
    """Stands for Triton's compiled kernel; started, it is interpreted, or recorded by a graph."""

    def __init__(self, wanted: CompileRequest, cuda: FakeCuda, places: FakePlaces) -> None:
        module, _, name = wanted.kernel.partition(":")
        self._function = getattr(importlib.import_module(module), name)
        # The interpreter runs kernels one after the other: none has to wait for another.
        constants = {n: n != programmatic_launch.FLAG and value for n, value in wanted.constexprs}
        self._constants = ep.resolved(constants)
        self._cuda, self._places = cuda, places

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def start(*ordered: Any) -> None:
            given = dict(zip(self._function.arg_names, ordered, strict=True))
            tensors = [x for x in pytree.tree_leaves(list(ordered)) if isinstance(x, torch.Tensor)]
            for tensor in tensors:
                if not self._places.is_there(tensor):
                    raise ValueError("Pointer argument cannot be accessed (cpu tensor?)")
            arguments = {n: value for n, value in given.items() if n not in self._constants}
            self._cuda._launch(partial(self._interpret, grid, arguments))

        return start

    def _interpret(self, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        with torch._C.DisableTorchFunction(), interpreter.interpreting():
            interpreter.run(self._function, grid, arguments, self._constants)


class _Event:
    def __init__(self, **options: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 0.01


class _Generator(torch.Generator):
    """Of the CPU, whatever is asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


PROPERTIES = SimpleNamespace(
    name="Fake GPU", L2_cache_size=1 << 16, total_memory=1 << 34, multi_processor_count=132,
    major=9, minor=0,
)  # fmt: skip


@contextmanager
def fake_gpu() -> Iterator[FakePlaces]:
    """Inside the block this machine has a GPU of compute capability 9.0, as far as torch tells."""
    # torch.export reads torch.cuda when it is first used, and must find what it knows.
    importlib.import_module("torch._dynamo.polyfills.loader")
    cuda, places = FakeCuda(), FakePlaces()
    memory = {name: lambda *rest: 0 for name in ("memory_allocated", "max_memory_allocated")}
    names: dict[str, Any] = {
        **memory, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_capability": lambda *rest: (9, 0),
        "get_device_name": lambda *rest: PROPERTIES.name,
        "get_device_properties": lambda *rest: PROPERTIES,
        "mem_get_info": lambda *rest: (1 << 22, 1 << 34), "reset_peak_memory_stats": _nothing,
        "Event": _Event, "_sleep": _nothing, "get_rng_state": torch.get_rng_state,
        "set_rng_state": _nothing,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        cuda.install(patch)
        for name, value in names.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(offline, "compile_request", lambda wanted: Kernel(wanted, cuda, places))
        patch.setattr(offline, "compile_all", _nothing)
        patch.setattr(offline, "resources", lambda wanted: Resources(32, 0, 0))
        patch.setattr(capture, "export", places.exporting(capture.export))
        with places:
            yield places


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: there is a GPU before the first test is read."""
    found = fake_gpu()
    found.__enter__()
    config.add_cleanup(lambda: found.__exit__(None, None, None))
