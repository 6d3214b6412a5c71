"""What was found on a GPU, as pages: correctness.md from tests*.json and findings.json, profiles.md
from profile-*.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import gpu_tests
from .report import write_text

SLOWEST = 12
"""Steps of a profile that are shown."""
FILES = ("tests.json", "tests-networks.json")


def write(folder: Path) -> None:
    """Writes the pages beside the files, where there is something to say."""
    outcomes: dict[str, str] = {}
    for file in FILES:
        outcomes |= gpu_tests.read(folder / file)
    if outcomes:
        findings = gpu_tests.read(folder / "findings.json")
        write_text(folder / "correctness.md", "\n".join(_page(outcomes, findings)) + "\n")
    profiles = [gpu_tests.read(path) for path in sorted(folder.glob("profile-*.json"))]
    profiles = [profile for profile in profiles if "kernels" in profile]
    if profiles:
        lines = ["# Where the time goes", *(line for each in profiles for line in _profile(each))]
        write_text(folder / "profiles.md", "\n".join(lines) + "\n")


def _profile(found: dict[str, Any]) -> Iterator[str]:
    """The slowest steps of one model at one batch."""
    slowest = sorted(found["kernels"], key=lambda each: -each["time_us"])[:SLOWEST]
    rows = [
        (each["name"], each["op"], each["config"], f"{each['time_us']:,.1f}",
         f"{each['share']:.1%}", f"{each['gbps']:,.0f}", f"{each['tflops']:,.1f}",
         "-" if each["of_bound"] is None else f"{each['of_bound']:.0%}")
        for each in slowest
    ]  # fmt: skip
    heading = f"{found['model']}, batch {found['batch']}: {found['total_us']:,.1f} us in "
    heading += f"{len(found['kernels'])} steps ({found['timed_on']})"
    columns = ("kernel", "op", "configuration", "us", "share", "GB/s", "TFLOP/s", "of bound")
    yield from _table(heading, columns, rows)


def _page(outcomes: dict[str, str], findings: dict[str, Any]) -> Iterator[str]:
    yield "# Correctness on the GPU"
    yield from _counts(outcomes)
    yield from _failures(outcomes)
    values: dict[str, list[Any]] = {}
    for found in findings.values():
        for name, value in found:
            values.setdefault(name, []).append(value)
    yield from _models([row for rows in values.get("model", []) for row in rows])
    yield from _warps([row for rows in values.get("eight warps over taps", []) for row in rows])
    unfired = sorted(map(str, values.get("rule that did not fire", [])))
    if unfired:
        yield from ("", "## Rules that did not fire on their example", "")
        yield from (f"- {each}" for each in unfired)


def _table(heading: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"## {heading}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _counts(outcomes: dict[str, str]) -> Iterator[str]:
    counts: dict[str, Counter[str]] = {}
    for name, told in outcomes.items():
        counts.setdefault(name.partition("[")[0], Counter())[told.partition(":")[0]] += 1
    kinds = (gpu_tests.PASSED, gpu_tests.FAILED, gpu_tests.SKIPPED)
    rows = [(name, *(count[kind] for kind in kinds)) for name, count in counts.items()]
    yield from _table("Tests", ("test", *kinds), rows)


def _failures(outcomes: dict[str, str]) -> Iterator[str]:
    rows = [
        (name, " ".join(told.split())[:300].replace("|", "/"))
        for name, told in outcomes.items()
        if told.startswith(gpu_tests.FAILED)
    ]
    yield from _table("Failures", ("test", "what it said"), rows)


def _models(found: list[dict[str, Any]]) -> Iterator[str]:
    rows = [
        (row["model"], row["precision"], row["batch"], row["kernels"], f"{row['compiled']:.2g}",
         f"{row['eager']:.2g}", row["problem"] or "right")
        for row in found
    ]  # fmt: skip
    columns = ("model", "precision", "batch", "kernels", "error", "eager's own", "verdict")
    yield from _table("Networks against fp64 (errors relative to the rms)", columns, rows)


def _warps(found: list[dict[str, Any]]) -> Iterator[str]:
    rows = [
        (row["layer"], row["dtype"], row["configuration"], "right" if row["right"] else row["said"])
        for row in found
    ]
    columns = ("layer", "dtype", "configuration", "verdict")
    yield from _table("More than four warps over filter taps (pytorch issue 173068)", columns, rows)
