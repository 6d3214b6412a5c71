"""Every op convloom knows, by name: one line per file, and those of extensions.

The tables are made when one of them is first looked at (the files of extensions import from this
package), and never change afterwards: `OPS`; `BY_NAME`; `CAPTURES`, by the call that becomes an op;
`SCALARS`, the pointwise functions among them; `OWNERS`, the extension that an op is of, by its
name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

from triton.runtime.jit import JITFunction

from .. import extensions
from ..errors import ExtensionError, UnsupportedOpError, near_names
from ..extensions import Extension
from .contract import scalars
from .contract.op import Attributes, Op
from .contract.scalars import Scalar
from .convolution import conv2d, conv_nd, conv_transpose, sample_conv
from .fused import (
    conv_mean,
    conv_pool,
    conv_rearrange,
    conv_sum,
    head,
    lrn_pool,
    pool_conv,
    small_net,
    squeeze_excite,
    stem,
    stem_input,
)
from .fused.chains import conv_chain, separable
from .movement import movement_ops, pad, pointwise_ops, rearrange, unfold
from .normalisation import batch_norm, lrn, normalize, reduce, scan, softmax, topk
from .pooling import (
    adaptive_pool,
    grid_sample,
    max_pool_indices,
    max_unpool,
    median_pool,
    mixed_pool,
    pool,
    resample,
    upsample,
)
from .products import bmm, linear

_OURS: tuple[Op, ...] = (
    conv2d.OP,
    conv_chain.OP,
    *conv_nd.OPS,
    *conv_transpose.OPS,
    sample_conv.OP,
    conv_mean.OP,
    conv_pool.OP,
    conv_rearrange.OP,
    conv_sum.OP,
    separable.OP,
    stem.OP,
    stem_input.OP,
    linear.OP,
    head.OP,
    small_net.OP,
    bmm.OP,
    *pointwise_ops.OPS,
    *movement_ops.OPS,
    *rearrange.OPS,
    *unfold.OPS,
    *softmax.OPS,
    *reduce.OPS,
    *scan.OPS,
    topk.OP,
    batch_norm.OP,
    normalize.OP,
    *pool.OPS,
    max_pool_indices.OP,
    max_unpool.OP,
    median_pool.OP,
    mixed_pool.OP,
    pool_conv.OP,
    squeeze_excite.OP,
    *adaptive_pool.OPS,
    lrn.OP,
    lrn_pool.OP,
    pad.OP,
    *upsample.OPS,
    resample.OP,
    grid_sample.OP,
)


class _Tables(NamedTuple):
    OPS: tuple[Op, ...]
    BY_NAME: Mapping[str, Op]
    CAPTURES: Mapping[str, Op]
    SCALARS: tuple[Scalar, ...]
    OWNERS: Mapping[str, Extension]


OPS: tuple[Op, ...]
BY_NAME: Mapping[str, Op]
CAPTURES: Mapping[str, Op]
SCALARS: tuple[Scalar, ...]
OWNERS: Mapping[str, Extension]


def __getattr__(name: str) -> Any:
    if name not in _Tables._fields:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_tables(), name)


@cache
def _tables() -> _Tables:
    """Raises: ExtensionError for an extension that clashes or breaks its contract."""
    ops, functions = [*_OURS], [*scalars.SCALARS]
    owners: dict[str, Extension] = {}
    for extension in extensions.loaded():
        _check_kinds(extension)
        added = (*map(pointwise_ops.op_of, extension.scalars), *extension.ops)
        for problem in chain(_clashes(ops, added), *map(_faults, (*extension.scalars, *added))):
            raise ExtensionError(f"the extension {extension}: {problem}. {extensions.LEAVE_OUT}")
        ops += added
        functions += extension.scalars
        owners |= {op.name: extension for op in added}
    scalars.extend(functions)
    return _Tables(
        tuple(ops),
        MappingProxyType({op.name: op for op in ops}),
        MappingProxyType({call: op for op in ops for call in op.aten}),
        tuple(functions),
        MappingProxyType(owners),
    )


def _check_kinds(extension: Extension) -> None:
    for field, kind in (("scalars", Scalar), ("ops", Op)):
        for each in getattr(extension, field):
            if not isinstance(each, kind):
                raise ExtensionError(
                    f"the extension {extension}: {field}: expected {kind.__name__}s, got "
                    f"{type(each).__name__}. {extensions.LEAVE_OUT}"
                )


def _clashes(known: list[Op], added: tuple[Op, ...]) -> Iterator[str]:
    """What is there already, in words: names, the calls that become ops, and the names by which
    files tell attributes and by which generated sources call functions."""
    classes = {op.attributes.__name__: op.attributes for op in known}
    stages = {*scalars.BY_NAME} - {op.name for op in known}
    calls = {call for op in known for call in op.aten}
    for what, names, taken in (
        ("an op", [op.name for op in added], {op.name for op in known}),
        ("a stage", [op.name for op in added], stages),
        ("the capture of", [call for op in added for call in op.aten], calls),
    ):
        for name, count in Counter(names).items():
            if count > 1 or name in taken:
                yield f"there is {what} {name!r} already; choose another name"
    for op in added:
        if classes.setdefault(op.attributes.__name__, op.attributes) is not op.attributes:
            yield f"op {op.name}: there are attributes called {op.attributes.__name__} already"


def _faults(each: Scalar | Op) -> Iterator[str]:
    """What of its contract an op or a function of an extension breaks, as far as can be told
    without computing; `convloom.testing` computes."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,59}", each.name):
        yield f"{each.name!r}: expected a name of small letters, digits and '_'"
    if isinstance(each, Op):
        if not issubclass(each.attributes, Attributes):
            yield f"op {each.name}: its attributes are no dataclass made of op.Attributes"
        if "__main__" in (each.attributes.__module__, module_of(each.launches)):
            yield f"op {each.name} is in a script, and not in a module that others can import"
        return
    if not isinstance(each.function, JITFunction):
        yield f"{each.name}: its function is no @triton.jit function"
        return
    known = each.function.fn.__name__
    if ":" in each.symbol and hasattr(scalars, known):
        yield f"{each.name}: convloom has a function {known} itself; choose another name"
    if not 1 <= each.operands <= 2:
        yield f"{each.name}: expected a function of 1 or 2 tensors, got {each.operands}"
    if any(len(example) != len(each.parameters) for example in each.examples):
        yield f"{each.name}: expected {len(each.parameters)} numbers in each of its examples"


def module_of(function: Any) -> str:
    """The module of a function, with some of its arguments given or not."""
    while hasattr(function, "func"):
        function = function.func
    return str(getattr(function, "__module__", ""))


def get(name: str) -> Op:
    """The op of that name.

    Raises: UnsupportedOpError with the near names.
    """
    known = _tables().BY_NAME
    if name not in known:
        raise UnsupportedOpError(f"unknown op {name!r}; {near_names(name, known)}")
    return known[name]
