"""`convloom ablate MODELS`: what each fusion buys, alone and together."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import networks, output
from . import options as shared

if TYPE_CHECKING:
    from ..compiler.explain.ablation import Ablation


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "ablate", help="what each fusion buys",
        description="Plans models with all fusions, with none, without each fusion and with each "
        "alone, and prints kernels, bytes that they read and write, and for a GPU the modelled "
        "time. No GPU is needed, and nothing is compiled or run.",
    )
    parser.add_argument("names", metavar="MODEL", nargs="+", help=shared.MODEL)
    add = parser.add_argument
    add("--fusions", metavar="NAME", nargs="+", default=["all"],
        help='"all" that a model has, labels (`convloom explain --labels`), or families such as '
        '"separable*", left out as one (default: all)')
    add("--batch", metavar="N", nargs="+", type=shared.positive, default=[None],
        help="images per call (default: the model's own, or 1)")
    shared.add_input(parser)
    add("--target", default=shared.PLANNED,
        help=f"as for compile (default: {shared.PLANNED})")
    add("--dtype", choices=shared.DTYPES, help="compute in this type (default: the model's)")
    add("--precision", choices=shared.PRECISIONS, default="ieee",
        help="float32 matrix products (default: ieee)")
    add("--fallback", choices=shared.FALLBACKS, default="error",
        help="ops without a kernel: refuse the model, or run them as torch ops (default: error)")
    add("--plot", metavar="FILE", type=Path, help="draw a chart (SVG)")


def run(options: argparse.Namespace) -> int:
    found = _ablated(options)
    if options.plot is not None:
        output.write_text(options.plot, found.to_svg())
    output.answer(options, found.to_json(), *_tables(found))
    return 0


def _ablated(options: argparse.Namespace) -> Ablation:
    from ..compiler.api import ablate

    target = shared.target(options)
    results = []
    for name in options.names:
        network = networks.find(name, options)
        for batch in options.batch:
            example, keywords = network.example(network.batch(batch))
            what = f"planning {name}, batch {network.batch(batch)}"
            # Under CONVLOOM_DEBUG the compiler prints: never into JSON.
            with output.working(what), redirect_stdout(sys.stderr):
                one = ablate(
                    network.model, example, kwargs=keywords, fusions=options.fusions,
                    target=target, dtype=options.dtype, precision=options.precision,
                    fallback=options.fallback,
                )  # fmt: skip
            results.append([replace(row, model=name) for row in one.rows])
    return replace(one, rows=tuple(row for rows in results for row in rows))


def _tables(found: Ablation) -> Sequence[object]:
    """One table for each model and batch; changes against all fusions."""
    headings = ("fusions", ">kernels", ">bytes", ">modelled us", ">of all fusions")
    tables: list[object] = []
    for (model, batch), rows in found.blocks().items():
        whole = rows[0].modelled_us
        cells = [
            (
                row.title, f"{row.kernels:,}", output.readable_size(row.size_bytes),
                "-" if row.modelled_us is None else f"{row.modelled_us:,.1f}",
                "-" if row.modelled_us is None or not whole else f"{row.modelled_us / whole:.2f}x",
            )
            for row in rows
        ]  # fmt: skip
        title = f"{model}, batch {batch}, {found.dtype}, {found.target}"
        tables.append(output.table(headings, cells, title))
    if any(row.modelled_us is not None for row in found.rows):
        tables.append("times are modelled, not measured")
    return tables
