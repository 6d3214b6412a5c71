"""`convloom compile NAME`: what the compiler makes of a model, kernel by kernel."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import models, output
from .options import compile_options, json_option

if TYPE_CHECKING:
    from rich.table import Table

    from ..compiler.executable import Executable, Kernel
    from .options import SubParsers


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "compile",
        help="compile a model and list its kernels",
        description="Compiles a zoo model and lists its kernels; for a GPU generation (no GPU "
        "needed) with the registers, memory and instructions that the machine code uses.",
        parents=[compile_options(), json_option()],
    )
    parser.add_argument("name", metavar="NAME", help=models.NAME_HELP)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compiles and prints the summary and the kernels."""
    with output.working(f"compiling {options.name}"):
        executable = models.compile_model(options, options.batch, weights=None)
        rows = [_row(kernel, executable.target.is_gpu) for kernel in executable.kernels]
    if options.json:
        kernels = [{key: row[key] for key in _JSON_KEYS} for row in rows]
        output.print_json({"summary": executable.summary, "kernels": kernels})
        return 0
    console = output.console()
    console.print(summary_text(executable))
    console.print(_table(rows, executable.target.is_gpu))
    return 0


_JSON_KEYS = ("name", "ops", "registers", "spill_bytes", "shared_bytes")


def _row(kernel: Kernel, has_code: bool) -> dict[str, Any]:
    """The kernel's figures; None where the target has no machine code."""
    report = kernel.report() if has_code else None
    row: dict[str, Any] = {"name": kernel.name, "ops": list(kernel.ops)}
    for key in ("registers", "spill_bytes", "shared_bytes"):
        row[key] = getattr(report, key) if report else None
    if report is None:
        return row
    row["tensor_core"] = sum(n for opcode, n in report.instructions.items() if "MMA" in opcode)
    row["async_copies"] = report.count("LDGSTS") + report.count("UTMALDG")
    row["loads"] = sum(
        n for opcode, n in report.instructions.items() if opcode.partition(".")[0] == "LDG"
    )
    return row


def summary_text(executable: Executable) -> str:
    """Counts and memory in two lines."""
    counts = executable.summary
    arena, total = counts["arena_bytes"], counts["activation_bytes"]
    share = f" (the arena is {arena / total:.0%})" if total else ""
    return (
        f"{executable.target.name}: {executable.summary_line()}\n"
        f"activation arena {output.readable_size(arena)}; all activations together "
        f"{output.readable_size(total)}{share}"
    )


def resource_table(executable: Executable) -> Table:
    """Every kernel with what its machine code uses."""
    rows = [_row(kernel, executable.target.is_gpu) for kernel in executable.kernels]
    return _table(rows, executable.target.is_gpu)


_FIGURES = {
    "registers": "registers",
    "spill_bytes": "spilled B",
    "shared_bytes": "shared B",
    "tensor_core": "tensor core",
    "async_copies": "async copies",
    "loads": "loads",
}


def _table(rows: list[dict[str, Any]], has_code: bool) -> Table:
    from rich.table import Table

    table = Table("kernel", "captured ops")
    if has_code:
        for title in _FIGURES.values():
            table.add_column(title, justify="right")
    for row in rows:
        figures = [f"{row[key]:,}" for key in _FIGURES] if has_code else []
        table.add_row(row["name"], ", ".join(row["ops"]) or "(layout change)", *figures)
    return table
