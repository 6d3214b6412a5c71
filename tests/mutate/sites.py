"""Small changes of host code, by the operators of Cosmic Ray: one per line that computes.

Lines are taken in the order of a hash of what they say and where, so that a seed means the same
mutants as long as those lines stay, wherever they move.
"""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.operators.provider import OperatorProvider

from .judge import ROOT
from .mutant import Mutant, changed_lines, order

NO_ANSWERS = {
    "compiler/explain/account*.py": "tables of bytes and times for people",
    "compiler/explain/attribution.py": "names the layers behind kernels, for people",
    "compiler/explain/diff.py": "compares two files, for people",
    "compiler/fusion/estimate.py": "the cost model: a wrong time makes a slower choice",
    "compiler/capture/features.py": "the cost model",
    "compiler/explain/folding.py": "folds pictures by module",
    "compiler/explain/layers.py": "lays out the boxes of pictures",
    "compiler/graph/ledger.py": "text for people",
    "compiler/explain/picture.py": "pictures",
    "compiler/explain/places.py": "what pictures show",
    "compiler/graph/text.py": "text for people",
    "compiler/tuning/bench.py": "measures times",
    "compiler/run/workers.py": "processes that measure times",
    "compiler/tuning/cuda.py": "measures times on a GPU",
    "compiler/tuning/timers.py": "measures times",
    "compiler/records/rank.py": "the cost model",
    "compiler/tuning/search.py": "chooses by time among configurations that were all verified",
    "kernels/devices/emulator/*.py": "a judge of kernels, with tests of its own",
    "kernels/contract/cost_model.py": "figures of GPUs for the cost model",
    "kernels/devices/offline.py": "compiles for GPUs and reads machine code",
    "kernels/devices/kernel_hash.py": "prints generated source",
}
"""Files of compiler/ and kernels/ that compute no answer of a network, and why."""

_SPACE = "a tuning space: other choices are slower, or refused by `legal`"
_COST = "the cost model"
_DRAWN = "what tests draw"
_TEXT = "text for people"
NO_ANSWER_NAMES = {
    **dict.fromkeys(("*configs", "*default", "variants", "*tiles", "*_tile", "*_block"), _SPACE),
    **dict.fromkeys(("*TILES*", "RESIDENT", "ENOUGH_*", "GROUP_*"), _SPACE),
    **dict.fromkeys(("*cost*", "*_bytes", "*instructions*", "steps", "_steps", "*_us"), _COST),
    "_together": _COST,
    **dict.fromkeys(("*draw*", "*build_*", "_build", "*example*", "_module"), _DRAWN),
    **dict.fromkeys(("input_range", "prepare"), _DRAWN),
    **dict.fromkeys(("__str__", "__repr__", "describe*", "show*", "explain*", "_debug"), _TEXT),
    **dict.fromkeys(("MOST_*", "*SHORTEST_*", "LONGEST_*"), "a bound; either side of it is right"),
    "*ledger.*": _TEXT,
    **dict.fromkeys(("*TIMEOUT*", "QUEUEING_*"), "how long to wait for what does not answer"),
    "strict": "an assertion",
}
"""Names of functions, tables, fields, arguments and calls that compute none either."""


class DropOperand(Operator):
    """`a and b` without a, and without b; the same for `or`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type in ("and_test", "or_test"):
            for operand in node.children[::2]:
                yield operand.start_pos, operand.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        first = 2 * index - (1 if index else 0)
        del node.children[first : first + 2]
        return node

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return (Example("a and b", " b"), Example("a and b", "a", occurrence=1))


class DropGuard(Operator):
    """A branch without `else` that leaves the function or the iteration is never taken."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "if_stmt" and len(node.children) == 4:
            last = node.children[3].children[-1]
            leaves = getattr(last, "children", [last])[0]
            if leaves.type in ("return_stmt", "raise_stmt", "keyword", "continue_stmt"):
                yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        condition = node.children[1].get_code(include_prefix=False)
        node.children[1] = parso.parse(f" False and ({condition})")
        return node

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return (Example("if a:\n    return 1\n", "if False and (a):\n    return 1\n"),)


_provider = OperatorProvider()
_names = [
    *(f"ReplaceBinaryOperator_{name}" for name in (
        "Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "Div_Mul", "Mod_FloorDiv", "Pow_Mul",
        "BitOr_BitAnd", "BitAnd_BitOr")),
    *(f"ReplaceComparisonOperator_{name}" for name in (
        "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is")),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "AddNot",
    "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer",
    "ZeroIterationForLoop",
]  # fmt: skip
OPERATORS: dict[str, type[Operator]] = {
    **{name: _provider[name] for name in _names},
    "DropOperand": DropOperand,
    "DropGuard": DropGuard,
}


@dataclass(frozen=True)
class _Site:
    """A line of one file, and the ways to change it: (operator, occurrence in the file)."""

    file: str
    function: str
    lines: tuple[int, int]
    ways: tuple[tuple[str, int], ...]
    name: str


def host_mutants(seed: int, only: str = "") -> Iterator[Mutant]:
    """Mutants of different lines, in the order of the seed."""
    sites = [site for file in host_files() if file.startswith(only) for site in _sites(file)]
    for site in sorted(sites, key=lambda site: order(seed, site.name)):
        source = (ROOT / site.file).read_text()
        for operator, occurrence in sorted(
            site.ways, key=lambda way: order(seed, f"{site.name} {way[0]} {way[1]}")
        ):
            code = mutate_code(source, OPERATORS[operator](), occurrence)
            if _compiles(code):
                before, after = changed_lines(source, code)
                yield Mutant(site.file, site.function, before, after, code, site.file, site.lines)
                break


def host_files() -> list[str]:
    files = (
        str(path.relative_to(ROOT))
        for room in ("compiler", "kernels")
        for path in sorted((ROOT / room).rglob("*.py"))
    )
    return [file for file in files if not any(fnmatch(file, pattern) for pattern in NO_ANSWERS)]


def _sites(file: str) -> Iterator[_Site]:
    source = (ROOT / file).read_text()
    statements = _statements(source)
    ways: dict[int, list[tuple[str, int]]] = defaultdict(list)
    functions: dict[int, str] = {}
    tree = get_ast(source)
    nodes = list(ast_nodes(tree))
    for name, kind in OPERATORS.items():
        count, operator = 0, kind()
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                function = _function(node)
                if function is not None:
                    ways[start[0]].append((name, count))
                    functions[start[0]] = function
                count += 1
    seen: dict[str, int] = defaultdict(int)
    text = source.splitlines()
    for line in sorted(ways):
        name = f"{file} {functions[line]} {text[line - 1].strip()}"
        seen[name] += 1
        yield _Site(file, functions[line], statements[line], tuple(ways[line]),
                    f"{name} {seen[name]}")  # fmt: skip


def _function(node: Any) -> str | None:
    """The qualified name of the function or table that a node belongs to; None where it computes
    nothing: jit functions, messages, annotations, assertions, modules that show what a rule
    rewrites, what `NO_ANSWER_NAMES` lists."""
    scope: list[str] = []
    inner = None
    while node is not None:
        if node.type in ("raise_stmt", "assert_stmt", "decorator", "import_from", "fstring"):
            return None
        if inner is not None and inner in _annotations(node):
            return None
        if node.type in ("funcdef", "classdef") and (_is_jit(node) or _is_example(node)):
            return None
        name = _name(node)
        if name and any(fnmatch(name, pattern) for pattern in NO_ANSWER_NAMES):
            return None
        is_table = node.type == "expr_stmt" and node.parent.parent.type == "file_input"
        if is_table or node.type in ("funcdef", "classdef"):
            scope.insert(0, name)
        inner, node = node, node.parent
    return ".".join(scope)


def _name(node: Any) -> str:
    """What a node gives a value to, or calls."""
    if node.type in ("funcdef", "classdef"):
        return str(node.name.value)
    if node.type in ("expr_stmt", "argument"):
        return str(node.children[0].get_code(include_prefix=False))
    if node.type == "atom_expr":
        callee = itertools.takewhile(lambda part: part.get_code()[0] != "(", node.children)
        return "".join(part.get_code(include_prefix=False) for part in callee)
    return ""


def _annotations(node: Any) -> list[Any]:
    if node.type == "annassign":
        return [node.children[1]]
    if node.type == "tfpdef":
        return [node.children[2]]
    if node.type == "funcdef":
        return [node.annotation]
    return []


def _is_jit(node: Any) -> bool:
    return any("jit" in decorator.get_code() for decorator in node.get_decorators())


def _is_example(node: Any) -> bool:
    """Whether it is a module that a rule gives as its example, or the `forward` of one."""
    if node.type == "classdef":
        bases = node.get_super_arglist()
        return bases is not None and "nn.Module" in bases.get_code()
    parameters = node.get_params()
    return bool(parameters) and parameters[0].name.value == "m"


def _statements(source: str) -> dict[int, tuple[int, int]]:
    """For every line the first and last line of the innermost statement it belongs to, bodies of
    compound statements left out."""
    spans: dict[int, tuple[int, int]] = {}
    for node in ast.walk(ast.parse(source)):  # outer ones first
        if isinstance(node, (ast.stmt, ast.excepthandler)):
            assert node.end_lineno is not None
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            for line in range(node.lineno, node.end_lineno + 1):
                spans[line] = (node.lineno, last)
    return spans


def _compiles(code: str | None) -> bool:
    try:
        compile(code or "(", "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True
