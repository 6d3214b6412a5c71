"""Runs `@triton.jit` kernels on the CPU, in the same process that also compiles them.

Triton decides at decoration time (TRITON_INTERPRET) whether a function is interpreted or compiled,
so out of the box one process does one or the other. Here a compiled `JITFunction` is interpreted on
demand: its source is rewritten by Triton's own `InterpretedFunction`, the language is patched for
the duration of one `interpreting()` block, and restored afterwards.

Eight things differ from upstream, on purpose:
- calls of nested jit functions (the standard library's too) are routed through
  `JITFunction.__call__` and do not patch the language again: upstream patches at every such call
  and never restores it;
- `tl.dot` upcasts bfloat16 operands, which numpy has no type for, and lets BLAS do the product;
- fp32 to bfloat16 rounds to nearest even as GPUs do, where upstream truncates;
- tensors are used in place, where upstream copies every storage to the host and back;
- integer sums are not computed a second time in int64 for an assertion that upstream's default
  options then leave out: that was a third of the time;
- types of blocks and of numpy and shapes of tensors are made once and shared, and a scalar that is
  spread over a block is not copied, which small tiles feel;
- a scalar truth value that is spread over a block stays one, as masks must be since Triton 3.9;
- a scalar is an index with any numpy: Triton 3.6 leaves the conversion to numpy, which refuses it
  for arrays of one dimension since 2.4.

What it proves is index arithmetic and fp32/fp16 maths only: docs/verification.md names the gaps.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import triton
import triton.compiler.code_generator  # Before it can keep builtins of a patched language.
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from ...errors import KernelError
from .language import LANGUAGE

_REWRITTEN: dict[int, tuple[JITFunction[Any], Any]] = {}


def _rewritten(function: JITFunction[Any]) -> Any:
    """The interpretable Python function behind a jit function (rewritten once)."""
    if id(function) not in _REWRITTEN:
        wrapper: Any = upstream.InterpretedFunction(function.fn)
        _REWRITTEN[id(function)] = (function, wrapper.rewrite())
    return _REWRITTEN[id(function)][1]


def _call_nested(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
    return _rewritten(function)(*args, **kwargs)


def _as_float32(handle: Any) -> np.ndarray[Any, Any]:
    if handle.dtype.scalar == tl.bfloat16:
        widened: np.ndarray[Any, Any] = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return widened
    values: np.ndarray[Any, Any] = np.asarray(handle.data, dtype=np.float32)
    return values


def _dot(a: Any, b: Any, d: Any, *_precision: Any) -> Any:
    if a.dtype.scalar.is_fp64() or not a.dtype.scalar.is_floating():
        product = np.matmul(a.data, b.data, dtype=d.data.dtype)
    else:
        product = np.matmul(_as_float32(a), _as_float32(b))
    product += d.data
    return upstream.TensorHandle(product, d.dtype.scalar)


def _fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once, as GPUs do: fp64 holds the product of two fp32 values."""
    kind, exact = c.data.dtype, np.float64
    total = a.data.astype(exact) * b.data.astype(exact) + c.data.astype(exact)
    return upstream.TensorHandle(total.astype(kind), c.dtype.scalar)


def _cast(src: Any, dst_type: Any) -> Any:
    source, destination = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and destination.is_floating():
        values = _as_float32(src).astype(_numpy_type(destination))
        return upstream.TensorHandle(values, destination)
    if destination == tl.bfloat16 and source.is_floating():
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        values = np.where(is_nan, quiet_nan, rounded).astype(np.uint16)
        return upstream.TensorHandle(values, destination)
    return upstream.TensorHandle(src.data.astype(_numpy_type(dst_type)), destination)


def _splat(kind: Any, scalar: Any) -> Any:
    """The scalar in every element. A truth value stays one, where upstream makes a number of it,
    which Triton 3.9 refuses as a mask. The shape goes to numpy as a plain tuple: an interruption
    inside the methods of `core.tuple` would come out of numpy as a TypeError."""
    value = np.asarray(scalar.data).reshape(())
    if value.dtype != bool:
        value = value.astype(_numpy_type(scalar.dtype))
    shape = tuple(kind.shape)
    everywhere: Any = np.ndarray(shape, value.dtype, value, strides=(0,) * len(shape))
    return upstream.TensorHandle(everywhere, scalar.dtype.scalar)


def _numpy_type(kind: Any) -> Any:
    """`upstream._get_np_dtype`, which makes a table of all types at every call; kept with the
    type."""
    known = vars(kind)
    if "numpy" not in known:
        known["numpy"] = _NUMPY_TYPE(kind)
    return known["numpy"]


_NUMPY_TYPE = upstream._get_np_dtype
OWN = {"create_dot": _dot, "create_fma": _fma, "cast_impl": _cast, "create_splat": _splat}
"""Methods of upstream's builder that are replaced."""


def _make_tensor(tensor: Any, handle: Any, kind: Any) -> None:
    """`tl.tensor.__init__`; shape and number of elements are kept with the type."""
    known = vars(kind)
    if "parts" not in known:
        sizes = kind.shape if kind.is_block() else ()
        shape = core.tuple([core.constexpr(size) for size in sizes])
        known["parts"] = shape, core.constexpr(math.prod(sizes)), kind.scalar
    tensor.handle, tensor.type = handle, kind
    tensor.shape, tensor.numel, tensor.dtype = known["parts"]


def _with_element_type(kind: Any, element: Any) -> Any:
    """`tl.block_type.with_element_ty`; the types that came of a type are kept with it."""
    known = vars(kind).setdefault("siblings", {})
    key = element.name, getattr(element, "address_space", None)
    if key not in known:
        known[key] = core.block_type(element, kind.shape)
    return known[key]


def _index(tensor: Any) -> int:
    """`tl.tensor.__index__`: a scalar is an array of one element, with one dimension or none."""
    return int(tensor.handle.data.item())


@contextmanager
def interpreting() -> Iterator[None]:
    """Inside the block jit functions are interpreted; compilation works again after it.

    One thread at a time: the patch is global to the process. It takes 1.5 ms, as long as a small
    kernel: one block is for many launches.
    """
    with LANGUAGE:
        builder, make_scope = upstream.interpreter_builder, upstream._LangPatchScope
        original_call, original_options = JITFunction.__call__, builder.options
        # Made here: upstream hands out its own only when it has patched everything, and whatever
        # interrupts it before would leave the language patched.
        scope = make_scope()

        def restore() -> None:
            """May be called again where it was interrupted itself."""
            upstream._LangPatchScope = make_scope
            JITFunction.__call__ = original_call
            for name in OWN:
                vars(builder).pop(name, None)
            builder.options = original_options
            for owner, name, original in reversed(scope._changes):
                if original is not upstream._MISSING:
                    setattr(owner, name, original)
                elif name in vars(owner):
                    delattr(owner, name)

        try:
            _PATCHED.append((threading.get_ident(), restore))
            upstream._LangPatchScope = lambda: scope
            upstream._patch_lang(_language_user)
            upstream._LangPatchScope = make_scope
            builder.options = replace(original_options, sanitize_overflow=False)
            vars(builder).update(OWN)
            scope.set_attr(core.tensor, "__init__", _make_tensor)
            scope.set_attr(core.tensor, "__index__", _index)
            scope.set_attr(core.block_type, "with_element_ty", _with_element_type)
            scope.set_attr(upstream, "_get_np_dtype", _numpy_type)
            scope.set_attr(core.block_type, "to_ir", lambda kind, builder: kind)
            JITFunction.__call__ = _call_nested
            # Padding lanes compute on garbage (0/0, inf - inf); their results are never stored.
            with np.errstate(all="ignore"):
                yield
        finally:
            try:
                restore()
            except BaseException:
                restore()
                raise
            finally:
                _PATCHED.pop()


_PATCHED: list[tuple[int, Callable[[], None]]] = []
"""The thread that has patched the language, and what undoes it."""


def _restore_in_child() -> None:
    """After a fork(): the thread that would is not there."""
    while _PATCHED and _PATCHED[-1][0] != threading.get_ident():
        _PATCHED.pop()[1]()


os.register_at_fork(after_in_child=_restore_in_child)


def _language_user() -> tuple[Any, Any]:
    """Upstream patches those language modules that a function's globals mention: here, both."""
    return tl, core


def run(
    function: JITFunction[Any],
    grid: tuple[int, int, int],
    arguments: Mapping[str, Any],
    constexprs: Mapping[str, Any],
) -> None:
    """Runs every program of the grid, one after the other; call inside `interpreting()`.

    Raises: KernelError naming the kernel and the program in which it failed.
    """
    body = _rewritten(function)
    values = {name: upstream._implicit_cvt(value) for name, value in arguments.items()}
    values.update(constexprs)
    expected = list(inspect.signature(function.fn).parameters)
    if sorted(values) != sorted(expected):
        raise KernelError(f"{function.__name__}: expected arguments {expected}, got {list(values)}")
    upstream.interpreter_builder.set_grid_dim(*grid)
    for index in itertools.product(*map(range, grid)):
        upstream.interpreter_builder.set_grid_idx(*index)
        try:
            body(**values)
        except Exception as error:
            raise KernelError(
                f"kernel {function.__name__}, program {index} of {grid}: {error!r} "
                f"(triton {triton.__version__}, interpreter)"
            ) from error
