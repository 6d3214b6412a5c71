"""`convloom compile NAME`: what the compiler makes of a model, kernel by kernel, or as a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from . import files, models, output
from .options import compile_options, json_option

if TYPE_CHECKING:
    from rich.table import Table

    from ..compiler.run.executable import Executable, Kernel
    from ..kernels.devices.offline import KernelReport
    from .options import SubParsers


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "compile",
        help="compile a model and list its kernels",
        description="Compiles a zoo model and lists its kernels; for a GPU generation (no GPU "
        "needed) with the registers, memory and instructions that the machine code uses. With -o "
        "it writes a file that runs without being compiled again.",
        parents=[compile_options(several=True, slide=True), json_option()],
    )
    parser.add_argument("name", metavar="NAME", help=models.NAME_HELP)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="write an executable (*.loom) of every target and batch, which `convloom run` takes",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help='a .safetensors or .pth file, or "digits" for lenet5 (default: random, seed 0)',
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compiles and prints the summary and the kernels, or writes the file."""
    executables = _executables(options)
    if options.output is not None:
        return _write(options, executables)
    if len(executables) > 1:
        raise InvalidInputError(
            "--target, --batch: expected one of each, or -o FILE to write all of them to"
        )
    executable = executables[0]
    with output.working(f"reading the kernels of {options.name}"):
        shown = _answer(executable) if options.json else kernel_table(executable)
    if options.json:
        output.print_json(shown)
        return 0
    console = output.console()
    console.print(summary_text(executable))
    console.print(shown)
    return 0


def _executables(options: argparse.Namespace) -> list[Executable]:
    """One per target and batch; where there are several batches, each is a range of its own."""
    made = []
    several = len(options.batch) > 1
    for target in options.target or [None]:
        for each in options.batch:
            batch = (each, each) if several and isinstance(each, int) else each
            one = argparse.Namespace(**{**vars(options), "target": target})
            shown = "-".join(map(str, batch)) if isinstance(batch, tuple) else batch
            with output.working(f"compiling {options.name} for {target or 'here'}, batch {shown}"):
                made.append(models.compile_model(one, batch, options.weights))
    return made


def _write(options: argparse.Namespace, executables: list[Executable]) -> int:
    from ..compiler.artifact.read import open_artifact

    executables[0].save(options.output, *executables[1:], model=options.name)
    found = files.facts(open_artifact(options.output))
    if options.json:
        output.print_json(found)
        return 0
    console = output.console()
    for executable in executables:
        console.print(summary_text(executable))
    size = output.readable_size(options.output.stat().st_size)
    console.print(f"wrote {options.output}: {size}, sha256 {found['sha256']}", markup=False)
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
