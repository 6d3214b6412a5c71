"""`convloom tune`: finds the fastest configuration of every kernel of models, and keeps records."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import ArtifactError, InvalidInputError, TargetUnavailableError
from . import models, output
from . import options as shared

if TYPE_CHECKING:
    from rich.table import Table

    from ..compiler.records.choose import Listed, Records
    from ..compiler.records.store import Merged
    from ..compiler.tuning.judges import Judge
    from ..compiler.tuning.search import Outcome, Progress, Tuner, Work
    from ..kernels.contract.op import Problem
    from ..kernels.contract.targets import Target
    from .options import SubParsers

EVERY_MODEL = "all"
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
CANDIDATES = 12


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest configuration of each kernel, and keep it",
        description="Tries configurations of every kernel of zoo models on this machine's GPU, "
        "verifies their results, times them, and keeps the best as records that `compile` looks "
        "up. Without --target it tunes for this machine's GPU. Interrupt it at any time: the best "
        "so far is kept, and the next run goes on.",
        parents=[shared.compile_options(batch=False), shared.json_option()],
    )
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help=f'models of the zoo, or "{EVERY_MODEL}"'
    )
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--batch", metavar="N", nargs="+", type=_count, default=[1], help="batches (default: 1)"
    )
    group.add_argument(
        "--budget", metavar="TIME", type=_seconds, help="stop after 90s, 20m or 2h (default: never)"
    )
    group.add_argument(
        "--candidates",
        metavar="N",
        type=_count,
        default=CANDIDATES,
        help=f"configurations of each kernel that are tried, at most (default: {CANDIDATES})",
    )
    group.add_argument("--retune", action="store_true", help="also what has a record already")
    group.add_argument(
        "--chosen-only",
        action="store_true",
        help="not the fusions that the cost model did not choose (otherwise they are timed too, "
        "and `compile` chooses by the times)",
    )
    group.add_argument(
        "--offline",
        action="store_true",
        help="no GPU: compile for --target and rank by the model; records say so",
    )
    group.add_argument(
        "--to",
        metavar="FOLDER",
        type=Path,
        help="where the records are kept (default: the cache folder)",
    )
    others = parser.add_argument_group("records").add_mutually_exclusive_group()
    others.add_argument(
        "--show", metavar="OP", nargs="?", const="", help="list the records, or those of one op"
    )
    others.add_argument(
        "--merge", metavar="FILE", nargs="+", type=Path, help="take over records of other machines"
    )
    others.add_argument("--prune", action="store_true", help="delete stale and unreadable records")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 20m or 2h, got {text!r}")
    return float(found[1]) * SECONDS[found[2]]


def run(options: argparse.Namespace) -> int:
    """Tunes, or looks after the records."""
    records_only = options.show is not None or options.merge or options.prune
    if options.names and records_only:
        raise InvalidInputError(
            f"models ({', '.join(options.names)}): expected none with --show, --merge and --prune"
        )
    if not options.names and not records_only:
        raise InvalidInputError(
            "expected the name of a model (see `convloom zoo`), --show, --merge or --prune"
        )
    if options.show is not None:
        return _show(options)
    if options.merge:
        return _merge(options)
    return _prune(options) if options.prune else _tune(options)


# Tuning.


def _tune(options: argparse.Namespace) -> int:
    from ..compiler.records.choose import Records, local_device
    from ..compiler.tuning.search import Options, Tuner

    started = time.monotonic()
    names = zoo.names() if options.names == [EVERY_MODEL] else options.names
    entries = [zoo.entry(name) for name in names]
    target = _target(options)
    judge = _judge(options, target)
    records = Records.here(options.to, local_device(target))
    works = _works(options, [entry.name for entry in entries], target, records)
    left = None
    if options.budget is not None:
        left = max(0.0, options.budget - (time.monotonic() - started))
    settings = Options(left, options.candidates, options.retune)
    with _progress() as watch:
        tuner = Tuner(records, judge, settings, watch)
        try:
            tuner.run(works)
        except KeyboardInterrupt:
            output.console(stderr=True).print(_summary(tuner, records), markup=False)
            raise
    if options.json:
        output.print_json(_answer(tuner, records))
    else:
        console = output.console()
        console.print(_outcome_table(tuner.outcomes))
        console.print(_summary(tuner, records), markup=False)
    if tuner.unsaved is not None:
        raise ArtifactError(tuner.unsaved)
    return 0


def _target(options: argparse.Namespace) -> Target:
    """What to tune for: `--target`, else this machine's GPU.

    Raises: TargetUnavailableError where there is no GPU and no target, and for targets that have
    nothing to tune.
    """
    from ..kernels.contract import targets

    if options.target is None and targets.local_capability() is None:
        raise TargetUnavailableError(
            "no GPU to measure on. Pass --offline --target cuda:sm_90 to compile for one that is "
            "not here and rank by the model (or --target interpreter to time the interpreter)"
        )
    target = targets.parse(options.target or "cuda")
    if not target.is_gpu and (options.offline or target is targets.REFERENCE):
        what = "--offline" if options.offline else "tune"
        raise TargetUnavailableError(
            f"{what}: target {target.name} has no machine code to rank; expected a GPU such as "
            "cuda:sm_90"
        )
    return target


def _judge(options: argparse.Namespace, target: Target) -> Judge:
    from ..compiler.tuning.judges import Model, measuring

    return Model(target) if options.offline else measuring(target)


def _works(
    options: argparse.Namespace, names: Sequence[str], target: Target, records: Records
) -> list[Work]:
    """The distinct problems of every model at every batch, and of the fusions that were weighed
    against each other there."""
    import torch

    from ..compiler.api import lowered
    from ..compiler.records.timings import Timings
    from ..compiler.tuning.search import problems_of, works_for

    known = Timings(records, target)
    wanted: list[tuple[Problem, Target]] = []
    for name in names:
        model = models.build(name)
        for batch in options.batch:
            with output.working(f"reading {name}, batch {batch}"), redirect_stdout(sys.stderr):
                _, plan, _ = lowered(
                    model,
                    (torch.zeros(batch, *zoo.entry(name).input_shape),),
                    target=target.name,
                    dtype=shared.dtype(options),
                    precision=options.precision,
                    passes=shared.passes(options),
                    fallback=options.fallback,
                    force=options.force,
                    forbid=options.forbid,
                    known=known,
                )
            wanted += problems_of(plan)
    return works_for(wanted if options.chosen_only else [*wanted, *known.new()])


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    notes = output.console(stderr=True)
    with Bar(*columns, console=notes, disable=not notes.is_terminal, transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def watch(progress: Progress) -> None:
            bar.update(
                task, completed=progress.done, total=progress.total, description=progress.text
            )

        yield watch


def _outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """One line for each problem, the heaviest first."""
    from rich.table import Table

    table = Table("kernel", "uses", "configuration", "us", "default us", "gain", "")
    for each in outcomes:
        record = each.record
        gain = each.default_us / record.time_us if record and each.default_us else None
        table.add_row(
            str(each.work.key),
            str(each.work.uses),
            str(record.config) if record else "-",
            f"{record.time_us:,.1f}" if record else "-",
            f"{each.default_us:,.1f}" if each.default_us else "-",
            f"{gain:.2f}x" if gain else "-",
            f"{each.status}, {record.status}" if record else each.status,
        )
    return table


def _summary(tuner: Tuner, records: Records) -> str:
    counts: dict[str, int] = {}
    for each in tuner.outcomes:
        counts[each.status] = counts.get(each.status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    spent = "; the budget is spent, the same command goes on" if tuner.out_of_time else ""
    return f"{told or 'nothing to tune'}{spent}. Records: {records.own.folder}"


def _answer(tuner: Tuner, records: Records) -> dict[str, Any]:
    from ..compiler.records.records import to_json

    return {
        "records": str(records.own.folder),
        "out_of_time": tuner.out_of_time,
        "unsaved": tuner.unsaved,
        "outcomes": [
            {
                "kernel": str(each.work.key),
                "uses": each.work.uses,
                "status": each.status,
                "default_us": each.default_us,
                "record": to_json(each.record) if each.record else None,
            }
            for each in tuner.outcomes
        ],
    }


# Records.


def _records(options: argparse.Namespace) -> Records:
    from ..compiler.records.choose import Records

    return Records.here(options.to)


def _show(options: argparse.Namespace) -> int:
    from ..compiler.records.choose import listed
    from ..compiler.records.records import to_json

    found = listed(_records(options), options.show or None)
    if options.json:
        output.print_json(
            [{"origin": e.origin, "stale": e.stale, **to_json(e.record)} for e in found]
        )
        return 0
    console = output.console()
    if not found:
        console.print("no records; `convloom tune NAME` makes some", markup=False)
        return 0
    console.print(_record_table(found))
    return 0


def _record_table(found: Sequence[Listed]) -> Table:
    from rich.table import Table

    table = Table("kernel", "for", "configuration", "time", "date", "")
    for each in found:
        record = each.record
        state = "" if record.complete else "interrupted"
        table.add_row(
            str(record.key),
            f"{record.key.architecture}, triton {record.key.triton}",
            str(record.config),
            f"{record} ({record.time_us:,.1f} us)" if not record.is_measured else str(record),
            record.date.partition("T")[0],
            ", ".join(filter(None, (each.origin, state, each.stale and f"stale: {each.stale}"))),
        )
    return table


def _merge(options: argparse.Namespace) -> int:
    from ..compiler.records.store import merge

    results = merge(_records(options).own, options.merge)
    _print_merged(results, options.json)
    refused = [each for each in results if each.outcome == "refused"]
    if refused:
        first = refused[0]
        raise ArtifactError(
            f"{len(refused)} of {len(results)} files were not taken over, the first one "
            f"'{first.path}': {first.reason}"
        )
    return 0


def _prune(options: argparse.Namespace) -> int:
    from ..compiler.records.store import prune

    _print_merged(prune(_records(options).own), options.json)
    return 0


def _print_merged(results: Sequence[Merged], as_json: bool) -> None:
    if as_json:
        output.print_json(
            [
                {"file": str(each.path), "outcome": each.outcome, "reason": each.reason}
                for each in results
            ]
        )
        return
    from rich.table import Table

    table = Table("kernel", "outcome", "reason")
    for each in results:
        name = str(each.record.key) if each.record else str(each.path)
        table.add_row(name, each.outcome, each.reason)
    console = output.console()
    console.print(table if results else "nothing to do", markup=False)
