"""`convloom`: the program, its sub-commands and how their errors end.

Nothing here, nor at the top of a sub-command's file, imports torch: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__, settings
from ..errors import ConvloomError, visible
from . import (
    ablate,
    bench,
    demo,
    doctor,
    evaluate,
    explain,
    export_server,
    interruption,
    profile,
    run,
    tune,
    verify,
    zoo,
)  # fmt: skip
from . import compile as compile_command

COMMANDS = (
    demo, zoo, compile_command, run, evaluate, verify, explain, ablate, bench, tune, profile,
    export_server, doctor,
)  # fmt: skip
EXIT_ERROR = 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="convloom",
        description="Compiles convolutional networks from PyTorch to fused Triton kernels.",
    )
    top.add_argument("--version", action="version", version=f"convloom {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.configure(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after an error message on stderr."""
    options = parser().parse_args(arguments)
    if arguments is None:  # A process of its own, which may be ended.
        interruption.end_in_time()
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except ConvloomError as error:
        if _wants_traceback():
            raise
        print(f"convloom: error: {visible(str(error))}", file=sys.stderr)
        return EXIT_ERROR
    except ModuleNotFoundError as error:
        if error.name not in doctor.REQUIRED or _wants_traceback():
            raise
        told = f"this needs the package {error.name}, which is not installed"
        print(f"convloom: error: {told}: pip install {error.name}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        if arguments is None:
            interruption.end()
        interruption.tell()
        return interruption.EXIT_STATUS
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; the interpreter must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _wants_traceback() -> bool:
    try:
        return settings.read().debug >= 1
    except ConvloomError:
        return False


if __name__ == "__main__":
    sys.exit(main())
