"""`convloom compile NAME`: what the compiler makes of a model, kernel by kernel, or as a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from . import files, networks, output
from . import options as shared

if TYPE_CHECKING:
    from rich.table import Table

    from ..compiler.run.executable import Executable
    from ..kernels.devices.offline import KernelReport


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "compile", shared.compile_options(several=True, slide=True),
        help="compile a model and list its kernels",
        description="Compiles a model and lists its kernels; for a GPU generation (no GPU "
        "needed) with the registers, memory and instructions that the machine code uses. With -o "
        "it writes a file that runs without being compiled again.",
    )
    parser.add_argument("name", metavar="NAME", help=shared.MODEL)
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path,
        help="write an executable (*.loom) of every target and batch, which `convloom run` takes",
    )
    shared.add_weights(parser)


def run(options: argparse.Namespace) -> int:
    """Compiles and prints the summary and the kernels, or writes the file."""
    executables = list(_executables(options))
    if options.output is not None:
        return _write(options, executables)
    if len(executables) > 1:
        raise InvalidInputError(
            "--target, --batch: expected one of each, or -o FILE to write all of them to"
        )
    (executable,) = executables
    with output.working(f"reading the kernels of {options.name}"):
        shown = _answer(executable) if options.json else kernel_table(executable)
    if options.json:
        output.print_json(shown)
    else:
        output.say(summary_text(executable), shown)
    return 0


def _executables(options: argparse.Namespace) -> Iterator[Executable]:
    """One per target and batch; where there are several batches, each is a range of its own."""
    network = networks.find(options.name, options, options.weights)
    several = len(options.batch) > 1
    for target in options.target or [shared.default_target()]:
        for size in options.batch:
            batch = (size, size) if several and isinstance(size, int) else size
            bounds = batch if isinstance(batch, tuple) else (network.batch(batch),)
            shown = "-".join(map(str, bounds))
            with output.working(f"compiling {options.name} for {target}, batch {shown}"):
                one = shared.changed(options, target=target)
                yield networks.compile_model(network, one, batch)


def _write(options: argparse.Namespace, executables: list[Executable]) -> int:
    from ..compiler.artifact.read import open_artifact

    executables[0].save(options.output, *executables[1:], model=options.name)
    facts = files.facts(open_artifact(options.output))
    size = output.readable_size(options.output.stat().st_size)
    told = f"wrote {options.output}: {size}, sha256 {facts['sha256']}"
    output.answer(options, facts, *map(summary_text, executables), told)
    return 0


def _answer(executable: Executable) -> dict[str, Any]:
    """Counts, and what every kernel computes and uses; None where there is no machine code."""
    kernels = []
    for kernel in executable.kernels:
        report = kernel.report() if executable.target.is_gpu else None
        figures = ("registers", "spill_bytes", "shared_bytes")
        used = {name: getattr(report, name, None) for name in figures}
        kernels.append({"name": kernel.name, "ops": list(kernel.ops), **used})
    return {"summary": executable.summary, "kernels": kernels}


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
    ops = {record.node: record.op for record in executable.ledger.account().nodes}
    has_code = executable.target.is_gpu
    rows = []
    for kernel in executable.kernels:
        # In the order of the captured graph, which is that of the module.
        names = [op for node, op in ops.items() if node in kernel.ops]
        figures = _machine_code(kernel.report()) if has_code else []
        computed = ", ".join(names) or "(layout change)"
        rows.append([kernel.name, kernel.module_path, computed, *figures])
    return output.table(("kernel", "module", "ops", *(_FIGURES if has_code else ())), rows)


_FIGURES = (
    ">regs", ">spilled\nbytes", ">shared\nbytes", ">tensor\ncore", ">async\ncopies", ">loads"
)


def _machine_code(report: KernelReport) -> list[str]:
    """The report under the titles of `_FIGURES`; instructions are counted as they stand."""
    counts = report.instructions.items()
    numbers = (
        report.registers,
        report.spill_bytes,
        report.shared_bytes,
        sum(count for opcode, count in counts if "MMA" in opcode),
        report.count("LDGSTS") + report.count("UTMALDG"),
        sum(count for opcode, count in counts if opcode.partition(".")[0] == "LDG"),
    )
    return [f"{number:,}" for number in numbers]
