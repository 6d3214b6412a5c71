"""`convloom explain NAME`: why every op ended in the kernel it did, and the kernels themselves."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import InvalidInputError
from . import models, output
from .options import compile_options, json_option

if TYPE_CHECKING:
    from ..compiler.executable import Executable, Kernel
    from .options import SubParsers

CODE = ("source", "ptx", "sass")


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "explain",
        help="print the fusion ledger, the graph or a kernel's code",
        description="Prints, for every captured op of a zoo model, the kernel that computes it, "
        "the rules that put it there and the rules that declined and why; or the fused graph for "
        "Graphviz; or the code of one kernel.",
        parents=[compile_options(), json_option()],
    )
    parser.add_argument("name", metavar="NAME", help=models.NAME_HELP)
    parser.add_argument("--dot", action="store_true", help="the fused graph, for Graphviz")
    parser.add_argument("--kernel", metavar="K", help="one kernel of the plan, by name")
    code = parser.add_mutually_exclusive_group()
    for kind, shown in zip(CODE, ("Triton source (default)", "PTX", "machine code"), strict=True):
        text = f"with --kernel: its {shown}"
        code.add_argument(f"--{kind}", dest="code", action="store_const", const=kind, help=text)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compiles and prints what was asked for."""
    if options.code and not options.kernel:
        raise InvalidInputError(
            f"--{options.code}: expected --kernel K too, to say which kernel's code to print"
        )
    if options.dot and (options.kernel or options.json):
        raise InvalidInputError("--dot: expected without --kernel and --json")
    with output.working(f"compiling {options.name}"):
        executable = models.compile_model(options, options.batch, weights=None)
    if options.kernel:
        _print_kernel(executable.kernel(options.kernel), options.code or "source", options.json)
    elif options.json:
        output.print_json(_account(executable))
    elif options.dot:
        print(_dot(executable), end="")
    else:
        print(executable.explain(), end="")
    return 0


def _account(executable: Executable) -> dict[str, object]:
    return {
        "summary": executable.summary,
        "ledger": executable.ledger.to_json(),
        "plan": executable.plan.to_json(),
    }


def _dot(executable: Executable) -> str:
    from ..compiler import text

    return text.to_dot(executable.graph)


def _print_kernel(kernel: Kernel, code: str, as_json: bool) -> None:
    text = {"source": kernel.source, "ptx": kernel.ptx, "sass": kernel.sass}[code]()
    if as_json:
        output.print_json({"kernel": kernel.name, "ops": list(kernel.ops), code: text})
        return
    print(text)
