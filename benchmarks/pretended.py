"""An H100 that is not there, for PyTorch's Inductor: it generates and compiles for one on any CPU.

Parameters and inputs are fake tensors "on cuda", torch.cuda answers with the figures of an H100,
and Triton compiles for sm_90 without a driver. What needs the device itself is left out, and
`LEFT_OUT` says so. It reaches into the private parts of one version of PyTorch: where another one
has moved them, an AttributeError or ImportError names the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

LEFT_OUT = (
    "loading kernels onto the device",
    "benchmarking: candidates of templates and of tiles, padding of products",
    "two patterns of torch.randperm, which cannot be traced without a device",
)
"""What Inductor would also spend time on; every one of these makes it look faster here."""
CAPABILITY = (9, 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class Driver:
    """Triton's driver, as far as compiling asks it."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": H100.shared_memory_per_block_optin,
            "multiprocessor_count": H100.multi_processor_count,
            "max_num_regs": H100.regs_per_multiprocessor,
            "warpSize": H100.warp_size,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value


ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": _constant(True),
    "is_initialized": _constant(False),
    "is_current_stream_capturing": _constant(False),
    "_is_compiled": _constant(True),
    "_lazy_init": _constant(None),
    "_exchange_device": _constant(0),
    "_maybe_exchange_device": _constant(0),
    "device_count": _constant(1),
    "current_device": _constant(0),
    "current_stream": _constant(SimpleNamespace(cuda_stream=0)),
    "synchronize": _constant(None),
    "get_rng_state": lambda *arguments: torch.get_rng_state(),
    "set_rng_state": _constant(None),
    "get_device_name": _constant(H100.name),
    "get_device_properties": _constant(H100),
    "get_device_capability": _constant(CAPABILITY),
    "mem_get_info": _constant((H100.total_memory, H100.total_memory)),
    "is_bf16_supported": _constant(True),
    "is_tf32_supported": _constant(True),
}
"""What torch.cuda says, by name."""
INTERFACE = (
    "current_device", "device_count", "get_device_properties", "is_available", "synchronize",
)  # fmt: skip
"""Of these torch._dynamo keeps copies of its own."""


def place(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Makes the parameters of the model fake ones on the device, channels last, and an input. Call
    it before `h100`, under a FakeTensorMode."""

    def fake(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(tuple(shape), dtype=dtype, device="cuda", memory_format=last)

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    copy = fake(tensor.shape, kind)
                    parameter = tensors is module._parameters
                    tensors[name] = nn.Parameter(copy, False) if parameter else copy
    return fake(shape, dtype)


@contextmanager
def h100(precompile: Callable[[Any], None]) -> Iterator[None]:
    """PyTorch finds an H100. `precompile` takes what Inductor would compile, load and time."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import misc_patterns
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    before = triton.runtime.driver._active
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any, create: bool = False) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=create))

        for name, answer in ANSWERS.items():
            patch(torch.cuda, name, answer)
        for name in INTERFACE:
            patch(CudaInterface, name, staticmethod(ANSWERS[name]))
        patch(torch._C, "_cuda_getCurrentRawStream", _constant(0), create=True)
        patch(CudaInterface, "get_raw_stream", staticmethod(_constant(0)), create=True)
        patch(fake_tensor, "init_gpu_context", _constant(None))
        patch(FakeTensorMode, "avoid_device_init", True)
        patch(misc_patterns, "_misc_patterns_init", _constant(None))
        patch(triton_helpers, "set_driver_to_gpu", _constant(None))
        patch(CachingAutotuner, "precompile", lambda tuner, *_, **__: precompile(tuner))
        triton.runtime.driver.set_active(Driver())
        try:
            yield
        finally:
            triton.runtime.driver._active = before


def area(configuration: dict[str, Any]) -> int:
    """Products of one step over a tile."""
    return int(
        configuration.get("BLOCK_M", 1)
        * configuration.get("BLOCK_N", 1)
        * configuration.get("BLOCK_K", 1)
    )


@contextmanager
def one_candidate(largest: bool) -> Iterator[None]:
    """Templates of convolutions and products have a single candidate, that Inductor lists first or
    whose tile is largest: there is nothing to choose from, where nothing can be timed."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    def pick(candidates: Iterable[Any], tile: Callable[[Any], dict[str, Any]]) -> list[Any]:
        rest = list(candidates)
        return [max(rest, key=lambda c: area(tile(c)))] if largest and rest else rest[:1]

    class OneChoice(InductorChoices):
        def get_conv_configs(self, device_type: str | None = "cuda") -> Any:
            listed = super().get_conv_configs(device_type)
            return lambda *args, **kwargs: pick(listed(*args, **kwargs), lambda c: c.kwargs)

        def _finalize_template_configs(self, *args: Any, **kwargs: Any) -> list[Any]:
            listed = super()._finalize_template_configs(*args, **kwargs)
            return pick(listed, lambda choice: choice.params.to_kwargs())

    with V.set_choices_handler(OneChoice()):
        yield
