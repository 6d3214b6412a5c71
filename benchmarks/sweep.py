"""Networks that other people wrote: `python -m benchmarks.sweep`.

The convolutional families of torchvision and timm, with random weights at a small resolution: each
network is captured, lowered, and its graph run by torch ops (`reference`), fused and as captured
(passes="none"), and, for one member of each family, by the kernels in the interpreter; results are
held to the module in fp64 as everywhere (`kernels/contract/tolerance.py`), and a plan for a GPU
is made. A name is all that is known of a network here: what compiles does so because its ops are
there. To the families come networks drawn by lot (`foreign.draw`) and those that issues name.

Each network has a process and a time limit of its own, and what is done is kept, so that the sweep
can be called again and goes on; results lie in benchmarks/results/foreign.json and foreign.md.
torchvision and timm must be importable (`pip install --no-deps torchvision timm`, and what they
import).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from convloom.errors import CaptureError, ConvloomError, InvalidInputError, near_names
from convloom.tests.whole_nets import SWEPT

from . import foreign
from .machine_info import git_hash

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT_S = 240.0
COMPILES, MISSING, WRONG, REFUSED = "compiles", "ops missing", "wrong", "refused"
NOT_BUILT, TOO_LONG, CRASHED = "not built", "time limit", "crashed"
AGREES = "agrees"
DRAWN, ASKED = "drawn", "asked for"
"""The families of what was drawn and of `SWEPT`."""
GPU = "cuda:sm_90"
LONGEST_REASON = 240


@dataclass(frozen=True)
class Row:
    """What became of one network.

    status: "compiles" means no torch fallback and nothing that differs; reason: why not, in words.
    missing: the ATen ops without a kernel, with the reason, and how often. reference, interpreter:
    "agrees", what differs, or "" where it was not run. planned: the kernels of a plan for sm_90 (0:
    none was made). git: the tree it was tried with.
    """

    name: str
    family: str
    status: str
    reason: str = ""
    side: int = 0
    convs: int = 0
    kernels: int = 0
    planned: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    reference: str = ""
    interpreter: str = ""
    seconds: float = 0.0
    git: str = ""


def family_of(name: str) -> str:
    """The family of a network."""
    return foreign.FAMILIES.get(name, ASKED if name in SWEPT else DRAWN)


def tried(name: str, interpret: bool) -> Row:
    """Captures, lowers, runs and checks one network."""
    started = time.perf_counter()
    try:
        found = _found(name, interpret)
    except CaptureError as error:
        found = {"status": REFUSED, "reason": _one_line(error)}
    except ConvloomError as error:
        found = {"status": REFUSED, "reason": f"{type(error).__name__}: {_one_line(error)}"}
    except (ImportError, ValueError) as error:
        found = {"status": NOT_BUILT, "reason": _one_line(error)}
    seconds = round(time.perf_counter() - started, 1)
    return Row(name, family_of(name), seconds=seconds, git=git_hash(), **found)


def _found(name: str, interpret: bool) -> dict[str, Any]:
    network = foreign.prepared(name)
    executable = network.executable("reference")
    calls = Counter(f"{call}: {call.reason}" for call in foreign.missing_ops(executable))
    plain = network.check(network.executable("reference", passes="none"))
    checks = {"reference": network.check(executable) or (plain and f"unfused: {plain}") or AGREES}
    if interpret and not calls:
        checks["interpreter"] = network.check(network.executable("interpreter")) or AGREES
    found = {
        "side": network.inputs[0].shape[-1],
        "convs": executable.plan.convs,
        "kernels": len(executable.plan.kernels),
        "planned": len(network.planned(GPU)[1].kernels),
        "missing": dict(calls.most_common()),
        **checks,
    }
    wrong = "; ".join(f"{at}: {text}" for at, text in checks.items() if text != AGREES)
    if wrong:
        return {**found, "status": WRONG, "reason": wrong}
    if calls:
        return {**found, "status": MISSING, "reason": _counted(calls)}
    return {**found, "status": COMPILES}


def _counted(calls: Counter[str]) -> str:
    return "; ".join(f"{count}x {call}" for call, count in calls.most_common())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # A library's own message may carry paths of the machine it runs on.
    text = re.sub(r"(/[\w.+-]+){2,}", "...", text)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."


def in_a_process(name: str, interpret: bool, limit_s: float) -> Row:
    """`tried` in a process of its own, which may crash or take too long."""
    # The parent has imported everything and run nothing: a fork is ready at once.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, name, interpret))
    started = time.perf_counter()
    process.start()
    theirs.close()
    status, reason = TOO_LONG, f"not done after {limit_s:.0f} s"
    try:
        if ours.poll(limit_s):
            row: Row = ours.recv()
            return row
    except EOFError:
        process.join()
        status, reason = CRASHED, f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    seconds = round(time.perf_counter() - started, 1)
    return Row(name, family_of(name), status, reason, seconds=seconds, git=git_hash())


def _child(answer: Connection, name: str, interpret: bool) -> None:
    torch.set_num_threads(1)
    answer.send(tried(name, interpret))


def markdown(rows: Sequence[Row], versions: str) -> str:
    """What compiles, the ops that are missing, and every network."""
    done = {row.name for row in rows if row.status == COMPILES}
    lines = ["# Networks that other people wrote", ""]
    lines += [f"Made by `python -m benchmarks.sweep`; {versions}.", ""]
    for library, families in foreign.LIBRARIES.items():
        names = [f"{library}/{member}" for members in families.values() for member in members]
        lines.append(f"- {library}: {len(done.intersection(names))} of {len(names)} compile")
    drawn, asked = ([row for row in rows if row.family == kind] for kind in (DRAWN, ASKED))
    left = foreign.DRAWN - len(drawn)
    lines += [
        f"- drawn: {sum(row.name in done for row in drawn)} of {len(drawn)} compile"
        + (f"; {left} are not tried yet" if left else ""),
        f"- asked for: {sum(row.name in done for row in asked)} of {len(asked)} compile",
        "",
        "A network compiles when every op has a kernel (no torch fallback) and its result agrees "
        "with the module in fp64: the graph run by torch ops, fused and (not in the first table) "
        'as captured (`passes="none"`), and, where said, the kernels in the interpreter. sm_90: '
        "the kernels of a plan for that GPU, in fp32. Weights are random, images small. "
        "`foreign.json` names the commit of each row.",
        "",
        "## Ops that are missing",
        "",
        *_missing_table(rows),
        "",
        "## Every network",
        "",
        *_table([row for row in rows if row not in (*drawn, *asked)]),
        "",
        "## Drawn",
        "",
        f"{foreign.DRAWN} further names: of all names of torchvision and timm that are not above, "
        f"in an order shuffled by `random.Random({foreign.SEED})`, the first whose networks have "
        f"at most {foreign.LARGEST / 1e6:g} million parameters. Left out are detectors (how many "
        "boxes there are depends on the image) and networks of int8 operators. The smallest "
        "stands first; every name that was drawn is listed. In efficientvim_m4_dist every block "
        "makes rounding about twice as large, in eager's too: that is off by 2.9e-4 with "
        "channels last, by 1.8e-4 if the image's last bits change; fused, we are by 1.3e-4.",
        "",
        *_table(drawn),
        "",
        "## Asked for",
        "",
        "What issues name (raft_small and halonet26t were drawn). Of detectors: what comes before "
        "boxes are chosen. whole/...: a few channels wide, written in tests/whole_nets.py.",
        "",
        *_table(asked),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| network | image | convolutions | kernels | sm_90 | reference | interpreter | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        result = row.status if row.status == COMPILES else f"**{row.status}**: {row.reason}"
        checks = (_verdict(check) for check in (row.reference, row.interpreter))
        counts = (row.side or "-", row.convs, row.kernels, row.planned or "-")
        cells = (row.name, *counts, *checks, result)
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return lines


def _verdict(check: str) -> str:
    return check or "-" if check in ("", AGREES) else "differs"


def _missing_table(rows: Sequence[Row]) -> list[str]:
    networks: dict[str, list[str]] = {}
    calls: Counter[str] = Counter()
    for row in rows:
        for call, count in row.missing.items():
            networks.setdefault(call, []).append(row.name)
            calls[call] += count
    if not networks:
        return ["None."]
    order = sorted(networks, key=lambda call: (-len(networks[call]), call))
    return [
        "| op: reason | networks | calls | which |",
        "|---|---|---|---|",
        *(
            f"| {call} | {len(networks[call])} | {calls[call]} | {', '.join(networks[call])} |"
            for call in order
        ),
    ]


def kept(path: Path) -> tuple[list[str], dict[str, Row]]:
    """The names that were drawn and the rows of an earlier call, by name."""
    if not path.is_file():
        return [], {}
    plain = json.loads(path.read_text())
    return plain[DRAWN], {row["name"]: Row(**row) for row in plain["rows"]}


def write(drawn: Sequence[str], rows: dict[str, Row], folder: Path) -> None:
    """Both files, in the order of the families and then of the draw."""
    torchvision, timm = foreign.import_libraries()
    versions = (
        f"torch {torch.__version__.partition('+')[0]}, torchvision "
        f"{torchvision.__version__.partition('+')[0]}, timm {timm.__version__}"
    )
    ordered = [rows[name] for name in (*foreign.FAMILIES, *drawn, *SWEPT) if name in rows]
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"versions": versions, DRAWN: drawn, "rows": [asdict(row) for row in ordered]}
    (folder / "foreign.json").write_text(json.dumps(plain, indent=1) + "\n")
    (folder / "foreign.md").write_text(markdown(ordered, versions))


def wanted(options: argparse.Namespace, drawn: Sequence[str], rows: dict[str, Row]) -> list[str]:
    """The networks to try: those named, else those not tried yet (`--again`: or that failed).

    Raises: InvalidInputError for an unknown name.
    """
    known = (*foreign.FAMILIES, *drawn, *SWEPT)
    for name in options.names:
        if name not in known:
            raise InvalidInputError(f"unknown network {name!r}: {near_names(name, known)}")
    if options.names:
        return list(options.names)
    failed = {n for n, row in rows.items() if options.again and row.status != COMPILES}
    return [name for name in known if name not in rows or name in failed]


def parser() -> argparse.ArgumentParser:
    """What the sweep can be told."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    made.add_argument("names", metavar="NAME", nargs="*", help='such as "timm/resnet50"')
    made.add_argument("--again", action="store_true", help="repeat those that did not compile")
    made.add_argument("--fresh", action="store_true", help="forget earlier results")
    made.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each network")
    made.add_argument("--budget", type=float, help="start none after this many seconds")
    made.add_argument(
        "--interpret",
        choices=("first", "all", "none"),
        default="first",
        help="whose kernels to run in the interpreter: the first of each family's (default)",
    )
    made.add_argument("--output", type=Path, default=RESULTS, help="the folder for results")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries what is left; status 1 while something has not been tried."""
    options = parser().parse_args(arguments)
    foreign.import_libraries()
    drawn, rows = kept(options.output / "foreign.json")
    if options.fresh:
        rows = {}
    if not drawn:
        drawn = foreign.draw()
        write(drawn, rows, options.output)
    names, started = wanted(options, drawn, rows), time.perf_counter()
    for name in names:
        if options.budget and time.perf_counter() - started > options.budget:
            print(f"{len(names) - names.index(name)} left: call again")
            return 1
        interpret = options.interpret == "all" or (
            options.interpret == "first" and name in foreign.FIRST
        )
        rows[name] = in_a_process(name, interpret, options.limit)
        write(drawn, rows, options.output)
        row = rows[name]
        print(f"{name:<36} {row.seconds:>6.1f} s  {row.status} {row.reason[:120]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
