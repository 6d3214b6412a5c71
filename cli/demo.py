"""`convloom demo`: a real network compiled, explained, run and checked, in four parts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import demo_digits, demo_emulator, demo_gpu_code, demo_photo, output
from .options import json_option

if TYPE_CHECKING:
    from .options import SubParsers

PARTS = {
    "digits": demo_digits, "photo": demo_photo, "gpu-code": demo_gpu_code,
    "emulator": demo_emulator,
}  # fmt: skip


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "demo",
        help="compile, run and check real networks (about two minutes)",
        description="digits: LeNet-5 reads handwritten digits. photo: ResNet-18 on a photograph, "
        "its errors layer by layer. gpu-code: ResNet-50 for an H100, with no GPU here. emulator: "
        "LeNet-5 as an H100 would run it.",
        parents=[json_option()],
    )
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("demo-output"),
        help="where the picture goes (default: ./demo-output)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the parts; the exit status is 1 when a result is not what it must be."""
    from ..errors import InvalidInputError, near_names

    for name in options.parts:
        if name not in PARTS:
            raise InvalidInputError(f"unknown part {name!r} of the demo; {near_names(name, PARTS)}")
    console = output.console(stderr=options.json)
    results: dict[str, Any] = {}
    started = time.perf_counter()
    for name in options.parts or PARTS:
        part = PARTS[name]
        console.rule(f"{name}: {part.TITLE}")
        results[name] = part.show(console, options.output_dir)
    seconds = time.perf_counter() - started
    console.rule(f"done in {seconds:.0f} s")
    if options.json:
        output.print_json({"parts": results, "seconds": seconds})
    return 0 if all(result["as_expected"] for result in results.values()) else 1
