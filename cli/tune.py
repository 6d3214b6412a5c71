"""`convloom tune`: finds the fastest configuration of every kernel of models, and keeps records."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import ArtifactError, InvalidInputError, TargetUnavailableError
from . import networks, output
from . import options as shared

if TYPE_CHECKING:
    from rich.table import Table

    from ..compiler.records.choose import Records
    from ..compiler.records.store import Merged
    from ..compiler.tuning.search import Outcome, Tuner, Work
    from ..kernels.contract.op import Problem
    from ..kernels.contract.targets import Target
    from .networks import Network

EVERY_MODEL = "all"
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
CANDIDATES = 12


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "tune", shared.compile_options(batch=False),
        help="find the fastest configuration of each kernel, and keep it",
        description="Tries configurations of every kernel of models on this machine's GPU, "
        "verifies their results, times them, and keeps the best as records that `compile` looks "
        "up. Without --target it tunes for this machine's GPU. Interrupt it at any time: the best "
        "so far is kept, and the next run goes on.",
    )
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help=f'{shared.MODEL}; or "{EVERY_MODEL}", the zoo'
    )
    add = parser.add_argument_group("tuning").add_argument
    add("--batch", metavar="N", nargs="+", type=shared.positive, default=[None],
        help="batches (default: the model's own, or 1)")
    add("--budget", metavar="TIME", type=_seconds,
        help="stop after 90s, 20m or 2h (default: never)")
    add("--candidates", metavar="N", type=shared.positive, default=CANDIDATES,
        help=f"configurations of each kernel that are tried, at most (default: {CANDIDATES})")
    add("--retune", action="store_true", help="also what has a record already")
    add("--chosen-only", action="store_true", help="not the fusions that the cost model did not "
        "choose (otherwise they are timed too, and `compile` chooses by the times)")
    add("--offline", action="store_true",
        help="no GPU: compile for --target and rank by the model; records say so")
    add("--to", metavar="FOLDER", type=Path,
        help="where the records are kept (default: the cache folder)")
    add = parser.add_argument_group("records").add_mutually_exclusive_group().add_argument
    add("--show", metavar="OP", nargs="?", const="", help="list the records, or those of one op")
    add("--merge", metavar="FILE", nargs="+", type=Path, help="take over records of other machines")
    add("--prune", action="store_true", help="delete stale and unreadable records")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 20m or 2h, got {text!r}")
    return float(match[1]) * SECONDS[match[2]]


def run(options: argparse.Namespace) -> int:
    records_only = options.show is not None or options.merge or options.prune
    if options.names and records_only:
        raise InvalidInputError(
            f"models ({', '.join(options.names)}): expected none with --show, --merge and --prune"
        )
    if not options.names and not records_only:
        raise InvalidInputError(
            "expected the name of a model (see `convloom zoo`), --show, --merge or --prune"
        )
    if not records_only:
        return _tune(options)
    from ..compiler.records.choose import Records
    from ..compiler.records.store import merge, prune

    records = Records.here(options.to)
    if options.show is not None:
        _show(records, options)
    elif options.merge:
        _print_merged(merge(records.own, options.merge), options)
    else:
        _print_merged(prune(records.own), options)
    return 0


# Tuning.


def _tune(options: argparse.Namespace) -> int:
    from ..compiler.records.choose import Records, local_device
    from ..compiler.tuning.search import Options, Tuner
    from ..compiler.tuning.timers import Model, measuring

    started = time.monotonic()
    names = zoo.names() if options.names == [EVERY_MODEL] else options.names
    # What nobody knows is refused before anything is compiled.
    own = {name: networks.find(name, options) for name in names if name not in zoo.names()}
    target = _target(options)
    timer = Model(target) if options.offline else measuring(target)
    records = Records.here(options.to, local_device(target))
    works = _works(options, names, own, target, records)
    left = options.budget and max(0.0, options.budget - (time.monotonic() - started))
    settings = Options(left, options.candidates, options.retune)
    with output.working(f"tuning {', '.join(options.names)}") as work:

        def watch(trying: str, done: int, total: int) -> None:
            work.what = trying
            work.heard("configurations", done, total)

        tuner = Tuner(records, timer, settings, watch)
        try:
            tuner.run(works)
        except KeyboardInterrupt:
            output.say(_summary(tuner, records), stderr=True)
            raise
    told = _outcome_table(tuner.outcomes), _summary(tuner, records)
    output.answer(options, _answer(tuner, records), *told)
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


def _works(
    options: argparse.Namespace, names: Sequence[str], own: Mapping[str, Network],
    target: Target, records: Records,
) -> list[Work]:  # fmt: skip
    """The distinct problems of every model at every batch, and of the fusions that were weighed
    against each other there. own: the models that are not of the zoo."""
    from ..compiler.records.choose import Timings
    from ..compiler.tuning.search import problems_of, works_for

    timings = Timings(records, target)
    problems: list[tuple[Problem, Target]] = []
    for name in names:
        network = own[name] if name in own else networks.find(name, options)
        for batch in options.batch:
            with output.working(f"reading {name}, batch {network.batch(batch)}"):
                _, plan, _ = networks.lower_for(
                    network, batch, options, target=target.name, known=timings
                )
            problems += problems_of(plan)
    return works_for(problems if options.chosen_only else [*problems, *timings.new()])


def _outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """One line for each problem, the heaviest first."""
    rows = []
    for each in outcomes:
        record = each.record
        gain = each.default_us / record.time_us if record and each.default_us else None
        rows.append((
            each.work.key,
            each.work.uses,
            record.config if record else "-",
            f"{record.time_us:,.1f}" if record else "-",
            f"{each.default_us:,.1f}" if each.default_us else "-",
            f"{gain:.2f}x" if gain else "-",
            f"{each.status}, {record.status}" if record else each.status,
        ))
    headings = ("kernel", "uses", "configuration", "us", "default us", "gain", "")
    return output.table(headings, rows)


def _summary(tuner: Tuner, records: Records) -> str:
    counts = Counter(outcome.status for outcome in tuner.outcomes)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    goes_on = "the same command goes on" if set(counts) - {"waiting"} else "give more"
    spent = f"; the budget is spent, {goes_on}" if tuner.out_of_time else ""
    return f"{told or 'nothing to tune'}{spent}. Records: {records.own.folder}"


def _answer(tuner: Tuner, records: Records) -> dict[str, Any]:
    from ..compiler.records.records import to_json

    outcomes = [
        {"kernel": str(each.work.key), "uses": each.work.uses, "status": each.status,
         "default_us": each.default_us, "record": to_json(each.record) if each.record else None}
        for each in tuner.outcomes
    ]  # fmt: skip
    return {"records": str(records.own.folder), "out_of_time": tuner.out_of_time,
            "unsaved": tuner.unsaved, "outcomes": outcomes}  # fmt: skip


# Records.


def _show(records: Records, options: argparse.Namespace) -> None:
    from ..compiler.records.choose import listed
    from ..compiler.records.records import to_json

    plain, rows = [], []
    for record, origin, stale in listed(records, options.show or None):
        plain.append({"origin": origin, "stale": stale, **to_json(record)})
        state = "" if record.complete else "interrupted"
        rows.append((
            record.key,
            f"{record.key.architecture}, triton {record.key.triton}",
            record.config,
            record if record.is_measured else f"{record} ({record.time_us:,.1f} us)",
            record.date.partition("T")[0],
            ", ".join(filter(None, (origin, state, stale and f"stale: {stale}"))),
        ))
    table = output.table(("kernel", "for", "configuration", "time", "date", ""), rows)
    output.answer(options, plain, table if rows else "no records; `convloom tune NAME` makes some")


def _print_merged(results: Sequence[Merged], options: argparse.Namespace) -> None:
    """Raises: ArtifactError where a file was refused."""
    plain = [{"file": str(e.path), "outcome": e.outcome, "reason": e.reason} for e in results]
    rows = [(e.record.key if e.record else e.path, e.outcome, e.reason) for e in results]
    told = output.table(("kernel", "outcome", "reason"), rows) if rows else "nothing to do"
    output.answer(options, plain, told)
    refused = [each for each in results if each.outcome == "refused"]
    if refused:
        first = refused[0]
        raise ArtifactError(
            f"{len(refused)} of {len(results)} files were not taken over, the first one "
            f"'{first.path}': {first.reason}"
        )
