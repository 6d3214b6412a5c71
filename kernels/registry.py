"""Every op convloom knows, by name: those of the files in folders of kernels, which are found by
being there, and those of extensions.

The tables are made when one of them is first looked at (the files of extensions import from this
package), and never change afterwards: `OPS`; `BY_NAME`; `CAPTURES`, by the call that becomes an op;
`SCALARS`, the pointwise functions among them; `OWNERS`, the extension that an op is of, by its
name.
"""

from __future__ import annotations

import pkgutil
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from itertools import chain
from types import MappingProxyType
from typing import Any

from triton.runtime.jit import JITFunction

from .. import extensions
from ..errors import ExtensionError, UnsupportedOpError, near_names
from ..extensions import Extension
from .contract import scalars
from .contract.op import Attributes, Op
from .contract.scalars import Scalar
from .movement import pointwise_ops

FOLDERS = (
    "convolution", "movement", "normalisation", "pooling", "products", "fused", "fused.chains"
)  # fmt: skip


def _ours() -> Iterator[Op]:
    """`OP`, or each of `OPS`, of every file in the folders of kernels."""
    for folder in FOLDERS:
        package = import_module(f".{folder}", __package__)
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            names = vars(import_module(found.name))
            yield from (names["OP"],) if "OP" in names else names.get("OPS", ())


OPS: tuple[Op, ...]
BY_NAME: Mapping[str, Op]
CAPTURES: Mapping[str, Op]
SCALARS: tuple[Scalar, ...]
OWNERS: Mapping[str, Extension]


def __getattr__(name: str) -> Any:
    if name.isupper() and name in _tables():
        return _tables()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _tables() -> Mapping[str, Any]:
    """Raises: ExtensionError for an extension that clashes or breaks its contract."""
    ops, functions = [*_ours()], [*scalars.SCALARS]
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
    return {
        "OPS": tuple(ops),
        "BY_NAME": MappingProxyType({op.name: op for op in ops}),
        "CAPTURES": MappingProxyType({call: op for op in ops for call in op.aten}),
        "SCALARS": tuple(functions),
        "OWNERS": MappingProxyType(owners),
    }


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
    known: Mapping[str, Op] = _tables()["BY_NAME"]
    if name not in known:
        raise UnsupportedOpError(f"unknown op {name!r}; {near_names(name, known)}")
    return known[name]
