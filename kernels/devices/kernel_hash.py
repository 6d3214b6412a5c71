"""What the kernels of an op are made of, in one hash: whether a measurement is still about them.

The hash covers every jit function that the op's launches can reach, by its syntax: comments,
docstrings, blank lines and where a function stands in its file do not change it. The functions that
are generated for one problem (its epilogue) are left out; records name the epilogue instead.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from .. import registry
from ..contract.op import Op

TRITON_VERSION: str = triton.__version__
ROOM = __name__.rsplit(".", 2)[0]
HASH_DIGITS = 16


@functools.cache
def source_hash(name: str) -> str:
    """The hash of a registered op's kernels: 16 hexadecimal digits.

    Raises: UnsupportedOpError for an unknown name.
    """
    return hash_of(registry.get(name))


def source_of(name: str, others: Iterable[str] = ()) -> str:
    """What a result of an op is about: its kernels' hash, and the extensions that it or one of the
    `others` (pointwise functions, its stages) is of, with their versions.

    Raises: UnsupportedOpError for an unknown name.
    """
    owners = {str(registry.OWNERS[each]) for each in (name, *others) if each in registry.OWNERS}
    return ", ".join((source_hash(name), *sorted(owners)))


def hash_of(op: Op) -> str:
    """16 hexadecimal digits that change when one of the op's kernels does."""
    texts = sorted(f"{name}\n{normalised(function)}" for name, function in kernels_of(op).items())
    return hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:HASH_DIGITS]


def kernels_of(op: Op) -> dict[str, JITFunction[Any]]:
    """The jit functions that the op's launches can reach."""
    module = registry.module_of(op.launches)
    return reachable((op.launches,), () if module.startswith(ROOM) else (module.partition(".")[0],))


def reachable(values: Iterable[Any], packages: tuple[str, ...] = ()) -> dict[str, JITFunction[Any]]:
    """The jit functions among the values and those that they can reach, by full name.

    What can be reached is read from the code: the names that functions mention, the attributes that
    they may take of a module of this room or of the `packages`, what partial functions, tables,
    tuples and the defaults of named tuples hold.
    """
    found: dict[str, JITFunction[Any]] = {}
    seen: set[int] = set()
    waiting, rooms = [*values], (ROOM, *packages)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, JITFunction):
            if value.fn.__module__.startswith(rooms):
                found[f"{value.fn.__module__}.{value.fn.__name__}"] = value
                waiting += _resolved(_parsed(value.src).mentioned, value.fn.__globals__, rooms)
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.FunctionType):
            if value.__module__.startswith(rooms):
                waiting += _named_by_function(value, rooms)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (tuple, list, set, frozenset)):
            waiting += value
        elif isinstance(value, type) and hasattr(value, "_field_defaults"):
            waiting += value._field_defaults.values()
    return found


def _named_by_function(function: types.FunctionType, rooms: tuple[str, ...]) -> Iterator[Any]:
    """What a Python function may use: globals, closures, defaults, attributes of our modules."""
    names = set(_code_names(function.__code__))
    yield from _resolved(names, function.__globals__, rooms)
    for cell in function.__closure__ or ():
        yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _code_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_names(constant)


def _kernel_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _resolved(
    names: Iterable[str], space: Mapping[str, Any], rooms: tuple[str, ...]
) -> Iterator[Any]:
    """The values of those names, and of those names as attributes of our modules among them."""
    names = sorted(names)
    for name in names:
        value = space.get(name)
        if isinstance(value, types.ModuleType):
            if value.__name__.startswith(rooms):
                yield from (vars(value)[each] for each in names if each in vars(value))
        elif value is not None:
            yield value


@dataclass(frozen=True)
class _Parsed:
    """A kernel's source. mentioned: the names in all of it; names: those in its text, which is
    without comments, docstring and decorators."""

    mentioned: frozenset[str]
    names: tuple[str, ...]
    text: str


@functools.cache
def _parsed(source: str) -> _Parsed:
    """Once for all ops that share a function: that was most of what planning a network took."""
    (tree,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(tree, ast.FunctionDef)
    mentioned = frozenset(_kernel_names(tree))
    tree.decorator_list = []
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:] or [ast.Pass()]
    return _Parsed(mentioned, tuple(sorted(set(_kernel_names(tree)))), ast.unparse(tree))


def normalised(function: JITFunction[Any]) -> str:
    """The function's source without comments, docstring and decorators, and the plain global
    constants that it reads."""
    parsed = _parsed(function.src)
    space = function.fn.__globals__
    constants = {
        name: repr(getattr(space[name], "value", space[name]))
        for name in parsed.names
        if isinstance(getattr(space.get(name), "value", space.get(name)), (int, float, str))
    }
    return "\n".join([*(f"{n} = {v}" for n, v in constants.items()), parsed.text])
