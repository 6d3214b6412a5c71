"""`convloom compile NAME`: what the compiler makes of a model, kernel by kernel."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import models, output
from .options import compile_options, json_option

if TYPE_CHECKING:
    from rich.table import Table

    from ..compiler.executable import Executable, Kernel
    from ..kernels.offline import KernelReport
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
        shown = _answer(executable) if options.json else kernel_table(executable)
    if options.json:
        output.print_json(shown)
        return 0
    console = output.console()
    console.print(summary_text(executable))
    console.print(shown)
    return 0


def _answer(executable: Executable) -> dict[str, Any]:
    has_code = executable.target.is_gpu
    kernels = [_figures(kernel, has_code) for kernel in executable.kernels]
    return {"summary": executable.summary, "kernels": kernels}


def _figures(kernel: Kernel, has_code: bool) -> dict[str, Any]:
    """What the kernel computes and uses; None where the target has no machine code."""
    report = kernel.report() if has_code else None
    return {
        "name": kernel.name,
        "ops": list(kernel.ops),
        "registers": report.registers if report else None,
        "spill_bytes": report.spill_bytes if report else None,
        "shared_bytes": report.shared_bytes if report else None,
    }


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


def kernel_table(executable: Executable) -> Table:
    """Every kernel: where in the module, which ops, and what its machine code uses."""
    from rich.table import Table

    ops = {fate.node: fate.op for fate in executable.ledger.fates}
    has_code = executable.target.is_gpu
    table = Table("kernel", "module", "ops")
    for title in _FIGURES if has_code else ():
        table.add_column(title, justify="right")
    for kernel in executable.kernels:
        # In the order of the captured graph, which is that of the module.
        names = [op for node, op in ops.items() if node in kernel.ops]
        figures = _machine_code(kernel.report()) if has_code else ()
        computed = ", ".join(names) or "(layout change)"
        table.add_row(kernel.name, kernel.module_path, computed, *figures)
    return table


_FIGURES = ("regs", "spilled\nbytes", "shared\nbytes", "tensor\ncore", "async\ncopies", "loads")


def _machine_code(report: KernelReport) -> list[str]:
    """The report under the titles of `_FIGURES`; instructions are counted as they stand."""
    counts = report.instructions.items()
    return [
        f"{number:,}"
        for number in (
            report.registers,
            report.spill_bytes,
            report.shared_bytes,
            sum(count for opcode, count in counts if "MMA" in opcode),
            report.count("LDGSTS") + report.count("UTMALDG"),
            sum(count for opcode, count in counts if opcode.partition(".")[0] == "LDG"),
        )
    ]
