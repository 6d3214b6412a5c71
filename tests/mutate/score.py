"""Results of mutants, kept as JSON lines, and the table made of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from .judge import ROOT, Verdict
from .mutant import Mutant

KILLED, ALIVE, EQUIVALENT = "killed", "alive", "equivalent"
EQUIVALENTS = Path(__file__).with_name("equivalent.json")


@dataclass(frozen=True)
class Result:
    """What became of a mutant; test, reason: what killed it, or why it is equivalent."""

    key: str
    room: str
    outcome: str
    test: str = ""
    reason: str = ""
    seconds: float = 0.0


def result_of(mutant: Mutant, verdict: Verdict) -> Result:
    """A mutant is killed where tests fail, cannot be run any more, or do not end."""
    outcome = ALIVE if verdict.outcome == "passed" else KILLED
    return Result(
        mutant.key, room_of(mutant), outcome, verdict.test, verdict.reason, verdict.seconds
    )


def excused(mutant: Mutant, reason: str) -> Result:
    return Result(mutant.key, room_of(mutant), EQUIVALENT, reason=reason)


def room_of(mutant: Mutant) -> str:
    """The folder of a host mutant; edits of kernels are a room of their own."""
    return f"{Path(mutant.file).parent}" + (" (jit)" if mutant.is_kernel else "")


def equivalents() -> dict[str, str]:
    """Why no test can tell these mutants from the project, by key."""
    reasons: dict[str, str] = json.loads(EQUIVALENTS.read_text())
    return reasons


def read(path: Path) -> dict[str, Result]:
    """The results in a file by key, the last of each; none where there is no file."""
    if not path.exists():
        return {}
    results = (Result(**json.loads(line)) for line in path.read_text().splitlines())
    return {result.key: result for result in results}


def append(path: Path, result: Result) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def percent(results: Iterable[Result]) -> float:
    """Killed ones among those that are not equivalent."""
    outcomes = [result.outcome for result in results if result.outcome != EQUIVALENT]
    return 100.0 * outcomes.count(KILLED) / len(outcomes) if outcomes else 100.0


def report(results: Collection[Result], seed: int) -> str:
    """The score as a page of Markdown."""
    rooms = sorted({result.room for result in results})
    rows = [(room, [result for result in results if result.room == room]) for room in rooms]
    table = [_row(name, group) for name, group in [*rows, ("all", list(results))]]
    alive = [f"- `{r.key}`" for r in results if r.outcome == ALIVE]
    equivalent = [f"- `{r.key}`: {r.reason}" for r in results if r.outcome == EQUIVALENT]
    return "\n".join([
        "# Mutants and the tests that notice them",
        "",
        f"`python -m tests.mutate --seed {seed} --mutants {len(results)}` at {_commit()}, "
        f"{date.today()}.",
        "",
        "| room | mutants | killed | alive | equivalent | score | hours |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *table,
        "",
        "Alive:",
        "",
        *(alive or ["none"]),
        "",
        "Equivalent, left out of the score:",
        "",
        *(equivalent or ["none"]),
        "",
    ])  # fmt: skip


def _row(name: str, results: list[Result]) -> str:
    outcomes = [result.outcome for result in results]
    hours = sum(result.seconds for result in results) / 3600
    counts = [outcomes.count(outcome) for outcome in (KILLED, ALIVE, EQUIVALENT)]
    shown = [name, len(results), *counts, f"{percent(results):.1f}%", f"{hours:.1f}"]
    return "| " + " | ".join(map(str, shown)) + " |"


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    return described.stdout.strip()
