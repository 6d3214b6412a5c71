"""What was measured, as JSON, CSV, Markdown and plots: losses are told first, not hidden."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convloom.atomic import replacing
from convloom.errors import ArtifactError
from convloom.kernels.contract import cost_model

from .charts import roofline, speed_ups
from .devices import gpu_state
from .machine_info import describe
from .measure import BOUND_DEVICE, Choices, Result, Row
from .peers import OURS

FORMAT = 1
LOSES = 0.995
"""A ratio below this is a loss; closer to 1 is a draw within the spread of a good clock."""
FILES = ("zoo.json", "zoo.csv", "zoo.md", "roofline.svg", "speed-up.svg")
"""Of a report; the last one of a GPU only."""
DETAILS = (
    "p10 .. p90", "of plan's bound", "peak MB", "compile + tuning s", "error / eager's", "host us",
)  # fmt: skip
"""Columns that go into a table of their own where lines are short."""


def slug(device: str) -> str:
    """The device's name as a folder's: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().partition("(")[0]).strip("-") or "unknown"


def write(folder: Path, rows: Sequence[Row], choices: Choices) -> None:
    """Writes every file of the report.

    Raises: ArtifactError where the folder cannot be written.
    """
    if not rows:
        return
    texts = {
        "zoo.json": json.dumps(as_json(rows, choices), indent=1, allow_nan=False) + "\n",
        "zoo.csv": as_csv(rows),
        "zoo.md": as_markdown(rows),
        "roofline.svg": roofline_plot(rows),
    }
    if rows[0].on_gpu:
        texts["speed-up.svg"] = speed_up_plot(rows)
    for name, text in texts.items():
        write_text(folder / name, text)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole or not there.

    Raises: ArtifactError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror or error}") from error


# JSON.


def as_json(rows: Sequence[Row], choices: Choices | None) -> dict[str, Any]:
    """Everything, with the machine it was measured on."""
    answer: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**describe(), "state": gpu_state()},
        "timed_on": "a GPU" if rows and rows[0].on_gpu else "the CPU",
        "rows": [asdict(row) for row in rows],
        "where_we_lose": losses(rows),
    }
    if choices is not None:
        chosen = asdict(choices) | {"dtype": str(choices.dtype).removeprefix("torch.")}
        answer["choices"] = chosen
    plain: dict[str, Any] = finite(answer)
    return plain


def finite(value: Any) -> Any:
    """Plain data without NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_rows(path: Path) -> list[Row]:
    """The rows of a report, to go on with; none where there is no such file yet.

    Raises: ArtifactError for a file that is no report, or one that a later version wrote.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}': expected a report of benchmarks, got {error}") from error
    version = stored.get("format") if isinstance(stored, dict) else None
    if version != FORMAT:
        later = isinstance(version, int) and version > FORMAT
        what = "a report from the future" if later else "no report of benchmarks"
        raise ArtifactError(f"'{path}': {what}: format {version!r}, expected {FORMAT}")
    try:
        return [
            Row(**{**row, "results": tuple(Result(**each) for each in row["results"])})
            for row in stored["rows"]
        ]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"'{path}': damaged report: {error}") from error


# Tables.


def as_csv(rows: Sequence[Row]) -> str:
    """One line per model, batch and contender."""
    text = io.StringIO()
    own = [each.name for each in fields(Row) if each.name != "results"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*own, *(each.name for each in fields(Result))])
    for row in rows:
        for result in row.results:
            mine = [getattr(row, name) for name in own]
            writer.writerow([*mine, *(getattr(result, each.name) for each in fields(Result))])
    return text.getvalue()


def losses(rows: Sequence[Row]) -> list[str]:
    """One line for each peer that is faster, for each wrong result, and for each model of ours that
    failed; the worst first."""
    found: list[tuple[float, str]] = []
    for row in rows:
        where = f"{row.model}, batch {row.batch}"
        for each in row.results:
            if each.name == OURS and each.status != "ok":
                found.append((0.0, f"{where}: convloom: {each.status}: {each.reason}"))
            elif each.ratio is not None and each.ratio < LOSES:
                found.append(
                    (each.ratio, f"{where}: {each.ratio:.2f}x against {each.name}, "
                                 f"{_us(row.ours.median_us)} against {_us(each.median_us)} us")
                )  # fmt: skip
    return [line for _, line in sorted(found)]


def where_we_lose(rows: Sequence[Row], bullet: str, heading: str, nowhere: str) -> list[str]:
    """The losses under a heading; without a GPU nothing is compared, and only failures are told."""
    found = [f"{bullet}{line}" for line in losses(rows)]
    if not found and not rows[0].on_gpu:
        return []
    return [heading, *(found or [nowhere])]


def cells(row: Row) -> list[str]:
    """The row for people: the figures of `headings` in their order."""
    mine = row.ours
    share, own_share = row.share_of(row.bound_us), row.share_of(row.plan_bound_us)
    eager = row.result("eager")
    return [
        row.model,
        str(row.batch),
        _us(mine.median_us) if mine.status in ("ok", "wrong") else mine.status,
        f"{_us(mine.p10_us)} .. {_us(mine.p90_us)}",
        _us(mine.warm_us),
        f"{mine.images_per_s:,.0f}" if mine.images_per_s else "-",
        *(_against(row, each) for each in row.results[1:]),
        f"{share:.0%}" if share else "-",
        f"{own_share:.0%}" if own_share else "-",
        str(mine.kernels or "-"),
        f"{mine.peak_mb:,.0f}" if mine.peak_mb else "-",
        _seconds(mine),
        f"{_error(mine)} / {_error(eager)}",
        _us(mine.host_us),
    ]


def headings(rows: Sequence[Row]) -> list[str]:
    """The columns of `cells`."""
    peers = [each.name for each in rows[0].results[1:]] if rows else []
    on_gpu = bool(rows) and rows[0].on_gpu
    return [
        "model", "batch", "median us", "p10 .. p90", "warm L2", "images/s",
        *(f"vs {peer}" if on_gpu else f"{peer} us" for peer in peers),
        "of bound T", "of plan's bound", "kernels", "peak MB", "compile + tuning s",
        "error / eager's", "host us",
    ]  # fmt: skip


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 1_000 else f"{value:,.0f}"


def _against(row: Row, each: Result) -> str:
    """A peer's figure: the ratio on a GPU, else only what it took."""
    known = each.ratio if row.on_gpu else each.median_us
    if known is None:
        return each.status
    wrong = " (wrong)" if each.status == "wrong" else ""
    return f"{known:.2f}x{wrong}" if row.on_gpu else f"{_us(known)}{wrong}"


def _seconds(each: Result) -> str:
    if each.compile_s is None:
        return "-"
    tuning = "" if each.tuning_s is None else f" + {each.tuning_s:.1f}"
    return f"{each.compile_s:.1f}{tuning}"


def _error(each: Result | None) -> str:
    return "-" if each is None or each.error is None else f"{each.error:.1e}"


def as_markdown(rows: Sequence[Row]) -> str:
    """The tables, one per set of peers, and where we lose."""
    first = rows[0]
    lines = [
        f"# convloom on {first.device}",
        "",
        note(first),
        "",
        *_table(rows),
        "",
        *where_we_lose(rows, "- ", "## Where we lose\n", "Nowhere that was measured."),
    ]
    absent = absences(rows)
    if absent:
        lines += ["", "## Not measured", "", *(f"- {line}" for line in absent)]
    state = {**describe(), **gpu_state()}
    lines += ["", "## Machine", "", *(f"- {name}: {value}" for name, value in state.items())]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    peers: list[str] | None = None
    for row in rows:
        names = [each.name for each in row.results]
        if names != peers:
            head = headings([row])
            gap = [""] if lines else []
            lines += [*gap, f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
            peers = names
        lines.append(f"| {' | '.join(cells(row))} |")
    return lines


def note(row: Row) -> str:
    """What the figures are, in words."""
    common = "All contenders in turns. Errors: the largest against fp64, relative to the rms."
    if not row.on_gpu:
        return (
            f"**Times of this CPU, which say nothing about a GPU; so no speed-ups.** {row.dtype}, "
            f"target {row.target}. {common}"
        )
    return (
        f"{row.dtype}, target {row.target}. Ratios above 1: convloom is faster; the median of "
        f"ratios within a round. {common} Cold L2 unless it says warm; every contender but `eager` "
        "in a CUDA graph, input copied in and result copied out. Bound T: `benchmarks/bounds.py`, "
        f"for the {BOUND_DEVICE}."
    )


def absences(rows: Sequence[Row]) -> list[str]:
    """Contenders without figures and why; the same reason once."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for each in row.results[1:]:
            if each.median_us is None:
                key = each.name, each.status, each.reason
                told.setdefault(key, []).append(f"{row.model} {row.batch}")
    return [
        f"{name}: {status}: {reason} ({', '.join(where[:4])}{' ...' if len(where) > 4 else ''})"
        for (name, status, reason), where in told.items()
    ]


# Plots.


def speed_up_plot(rows: Sequence[Row]) -> str:
    """The ratio to each peer, per model and batch."""
    ratios = {
        f"{row.model} {row.batch}": {each.name: each.ratio for each in row.results[1:]}
        for row in rows
    }
    first = rows[0]
    return speed_ups(f"convloom's speed-up, {first.dtype}, {first.device}", ratios)


def roofline_plot(rows: Sequence[Row]) -> str:
    """Achieved TFLOP/s over the FLOP per byte of the plan, under the roof of a known GPU."""
    points = []
    for row in rows:
        time_us = row.ours.median_us
        if time_us and row.size_bytes and row.flops:
            label = f"{row.model} {row.batch}"
            points.append((label, row.flops / row.size_bytes, row.flops / time_us / 1e6))
    first = rows[0]
    what = cost_model.MACHINES[90]
    known = what.name in first.device
    tflops, gbps = (what.tensor_tflops, what.memory_gbps) if known else (None, None)
    return roofline(f"Roofline, {first.dtype}, {first.device}", points, tflops, gbps)
