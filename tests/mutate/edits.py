"""Small changes of kernels: a table of source edits, made wherever they apply in a jit function.

What only a GPU can tell is left to `tests/test_gpu.py`: the order of memory operations between
programs, and offsets of tensors beyond 2^31 elements.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .judge import ROOT
from .mutant import Mutant, changed_lines, order


@dataclass(frozen=True)
class Edit:
    """What is done to a line that the pattern matches."""

    name: str
    pattern: str
    replacement: str


EDITS = (
    Edit("other= of a masked load", r"other=0\.0", "other=1.0"),
    Edit("other= of a maximum", r"other=(EMPTY|neutral|float\(\"-inf\"\))", "other=0.0"),
    Edit("a mask without its columns", r"mask = (\w+\[:, None\]) & \w+\[None, :\]$", r"mask = \1"),
    Edit("a mask without its rows", r"mask = \w+\[:, None\] & (\w+\[None, :\])$", r"mask = \1"),
    Edit("one row too many", r"row_mask = (\w+) < m$", r"row_mask = \1 <= m"),
    Edit("one column too many", r"column_mask = columns < ([\w.]+)$",
         r"column_mask = columns <= \1"),
    Edit("one input row too many", r"bitcast=True\) < (\w+\.H|H|HEIGHT\.size)\b",
         r"bitcast=True) <= \1"),
    Edit("one pixel too many", r"bitcast=True\) < (\w+\.W|WIDTH|WIDTH\.size)\b",
         r"bitcast=True) <= \1"),
    Edit("a sum that begins with one", r"= tl\.zeros\((.*), tl\.float32\)$",
         r"= tl.full(\1, 1.0, tl.float32)"),
    Edit("a maximum that begins with zero", r"tl\.full\((.*), EMPTY, tl", r"tl.full(\1, 0.0, tl"),
    Edit("NaN dropped", r", propagate_nan=NAN\)", ")"),
    Edit("NaN dropped", r"float\(\"nan\"\), (\w+)\)", r"\1, \1)"),
    Edit("without the stride", r" \* (\w+\.)*stride(_h)? - ", " - "),
    Edit("the stride of the other axis", r"\bWINDOW\.stride_w\b", "WINDOW.stride_h"),
    Edit("the padding of the other side", r" - (LEFT|PADDING_W)\b", " - 0"),
    Edit("without the offset of the input", r"x \+ (X_OFFSET|\w+\.offset)", "x"),
    Edit("without the offset of the output", r"y \+ (Y_OFFSET|OUTPUT\.offset)", "y"),
    Edit("a lane too far", r"= start \+ (depth|lanes)$", r"= start + \1 + 1"),
    Edit("the last block left out", r"in range\((first|0), (\w+), BLOCK_(\w+)\):",
         r"in range(\1, \2 - BLOCK_\3, BLOCK_\3):"),
    Edit("a tile rounded down", r"= \(([\w.]+) \+ ([\w.]+) - 1\) // \2$", r"= \1 // \2"),
    Edit("rows and columns of tiles exchanged", r"= program // column_tiles \*",
         "= program % column_tiles *"),
    Edit("the prologue's border", r"= tl\.where\((live|inside|a_mask), value, 0\.0\)", "= (value)"),
    Edit("the comparison turned", r"tl\.where\(v > 0,", "tl.where(v < 0,"),
    Edit("a pitch for a size", r"\((rows|pixel|corner) \* (\w+\.row_stride|Y_PITCH)\)",
         r"(\1 * (\2 + 1))"),
    # The same of kernels whose sizes are named tuples.
    Edit("the stride of the other axis", r"\.stride_w\b", ".stride_h"),
    Edit("the dilation of the other axis", r"\.dilation_w\b", ".dilation_h"),
    Edit("the padding of the other side", r" - (\w+\.)*window\.left\b", " - 0"),
    Edit("without the epilogue", r"\bacc = OUTPUT\.epilogue\(acc, .*\)$", "acc = acc"),
)  # fmt: skip

LAUNCHED_BY = {
    "contract/elementary": "movement/pointwise",
    "contract/scalars": "movement/pointwise",
    "fused/links": "fused/head",
    "normalisation/statistics": "normalisation/normalize",
    "pooling/pool_kernel": "pooling/pool",
    "pooling/tiles": "pooling/upsample",
    "tile/split_k": "tile/gemm",
    **{f"tile/{name}": "convolution/implicit"
       for name in ("engine", "finish", "product", "source", "space")},
}  # fmt: skip
"""The op's file whose tests judge the functions of a kernel's own file, both in `kernels/`."""
NOT_EDITED = (
    "contract/programmatic_launch", "contract/epilogue", "hopper/kernel",
)  # fmt: skip
"""The last one is never interpreted; its planted faults are those of tests/test_hopper.py."""


def sources() -> list[str]:
    """The files of kernels that are edited, without `kernels/` and `.py`."""
    folder = ROOT / "kernels"
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py"))
    return sorted(n for n in names if n not in NOT_EDITED and not n.startswith("devices/"))


def mutants(seed: int, only: str = "") -> list[Mutant]:
    """All edits that apply, in the order of the seed."""
    applied = (mutant for name in sources() if f"kernels/{name}.py".startswith(only)
               for mutant in _edited(name))  # fmt: skip
    different = {mutant.key: mutant for mutant in applied}
    return [different[key] for key in sorted(different, key=lambda key: order(seed, key))]


def _edited(name: str) -> Iterator[Mutant]:
    file, judged = f"kernels/{name}.py", f"kernels/{LAUNCHED_BY.get(name, name)}.py"
    source = (ROOT / file).read_text()
    lines = source.splitlines(keepends=True)
    where = (judged, _launching(judged))
    jitted = (f for f in _functions(source) if _is_jit(f))
    for function in jitted:
        for at in range(function.body[0].lineno - 1, function.end_lineno or 0):
            for edit in EDITS:
                line = re.sub(edit.pattern, edit.replacement, lines[at], count=1, flags=re.M)
                if line != lines[at]:
                    code = "".join([*lines[:at], line, *lines[at + 1 :]])
                    changed = changed_lines(source, code)
                    yield Mutant(file, function.name, *changed, code, *where, is_kernel=True)


def _is_jit(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _functions(source: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))


def _launching(file: str) -> tuple[int, int]:
    """The first and last line of the functions that launch the file's kernels, if any do."""
    lines = [
        line
        for function in _functions((ROOT / file).read_text())
        if "launch" in function.name
        for line in (function.body[0].lineno, function.end_lineno or 0)
    ]
    return min(lines, default=0), max(lines, default=0)
