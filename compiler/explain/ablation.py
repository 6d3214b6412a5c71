"""What each fusion buys: a network planned with it and without it, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from html import escape
from typing import Any

from ...errors import InvalidInputError, near_names
from ...kernels.contract.targets import Target
from ..graph.ledger import Ledger
from ..passes import LABELS
from ..plan.plan import Plan
from .attribution import label_of, step_bytes, step_time_us

ALL, NONE, WITHOUT, ALONE = "all fusions", "no fusion", "without", "alone"
Planner = Callable[[tuple[str, ...], str], tuple[Plan, Ledger]]
"""The plan under forbidden fusions by the "default" passes or by "none", and its ledger."""


@dataclass(frozen=True)
class Row:
    """One plan. fusion: a label or a family ("separable*"), "" for all or none of them. how: "all
    fusions", "no fusion" (every captured op alone, as `explain` counts them), "without" the fusion,
    or all other passes and the fusion "alone". size_bytes: read and written
    if every tensor is touched once; modelled_us: None where the target is not a GPU, or a step runs
    as a torch op."""

    model: str
    batch: int
    fusion: str
    how: str
    kernels: int
    size_bytes: int
    modelled_us: float | None

    @property
    def title(self) -> str:
        """Which fusions it has, in words."""
        if not self.fusion:
            return self.how
        return f"without {self.fusion}" if self.how == WITHOUT else f"{self.fusion} alone"


@dataclass(frozen=True)
class Ablation:
    """Rows by model and batch: all fusions, none, then each fusion left out and by itself."""

    target: str
    dtype: str
    rows: tuple[Row, ...]

    def blocks(self) -> dict[tuple[str, int], list[Row]]:
        blocks: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            blocks.setdefault((row.model, row.batch), []).append(row)
        return blocks

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def to_svg(self) -> str:
        """Bars of kernels, bytes and modelled times, beside those of all fusions together."""
        return _drawn(self)


def groups_of(fusions: str | Sequence[str], made: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The labels behind each name: "all" are the fusions that the network has, by themselves;
    others are labels, or families such as "separable*", which are left out as one.

    Raises: InvalidInputError for a name of no fusion.
    """
    known = tuple(dict.fromkeys(LABELS.all.values()))
    groups: dict[str, tuple[str, ...]] = {}
    for name in (fusions,) if isinstance(fusions, str) else fusions:
        if name == "all":
            groups.update({label: (label,) for label in known if label in made})
            continue
        labels = tuple(label for label in known if fnmatchcase(label, str(name)))
        if not labels:
            raise InvalidInputError(
                f"fusions: no fusion is named {name!r}; {near_names(str(name), (*known, 'all'))}"
            )
        groups[name] = labels
    return groups


def rows_of(
    model: str, batch: int, target: Target, fusions: str | Sequence[str], planned: Planner
) -> Iterator[Row]:
    """The rows of one network at one batch. Raises: InvalidInputError for a name of no fusion."""

    def row(fusion: str, how: str, forbidden: Sequence[str]) -> Row:
        # A bare label could be the path of a module too.
        plan, _ = planned(tuple(f"{label}@*" for label in forbidden), "default")
        return _row(model, batch, fusion, how, plan, target)

    known = tuple(dict.fromkeys(LABELS.all.values()))
    groups_of(fusions, known)  # What nobody knows is refused before anything is planned.
    plan, ledger = planned((), "default")
    yield _row(model, batch, "", ALL, plan, target)
    yield _row(model, batch, "", NONE, planned((), "none")[0], target)
    made = tuple(label_of(event) for event in ledger.events if event.accepted)
    for name, labels in groups_of(fusions, made).items():
        yield row(name, WITHOUT, labels)
        yield row(name, ALONE, [label for label in known if label not in labels])


def _row(model: str, batch: int, fusion: str, how: str, plan: Plan, target: Target) -> Row:
    times = [step_time_us(step, target) for step in plan.steps] if target.has_times else [None]
    known = [time for time in times if time is not None]
    time_us = sum(known) if len(known) == len(times) else None
    size = sum(map(step_bytes, plan.steps))
    return Row(model, batch, fusion, how, len(plan.kernels), size, time_us)


# The chart.

LEFT, WIDTH, BAR, GAP, TOP = 230, 210, 16, 26, 70
COLOURS = {ALL: "#0072B2", NONE: "#999999", WITHOUT: "#E69F00", ALONE: "#009E73"}
METRICS: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("kernels", lambda row: row.kernels, ",.0f"),
    ("MB read and written", lambda row: row.size_bytes / 1e6, ",.1f"),
    ("modelled us", lambda row: row.modelled_us, ",.1f"),
)


def _drawn(ablation: Ablation) -> str:
    parts, y = [], TOP
    for (model, batch), rows in ablation.blocks().items():
        parts.append(_text(10, y, f"{model}, batch {batch}", 'font-weight="bold"'))
        largest = [max((value(r) or 0.0 for r in rows), default=0.0) for _, value, _ in METRICS]
        for row in rows:
            y += BAR
            parts.append(_text(LEFT - 8, y + 4, row.title, 'text-anchor="end"'))
            for at, ((_, value, form), most) in enumerate(zip(METRICS, largest, strict=True)):
                x, number = LEFT + at * (WIDTH + 80), value(row)
                length = 0.0 if number is None or not most else number / most * WIDTH
                parts.append(
                    f'<rect x="{x}" y="{y - 6}" width="{length:.1f}" height="{BAR - 4}" '
                    f'fill="{COLOURS[row.how]}"/>'
                )
                told = "not modelled" if number is None else format(number, form)
                parts.append(_text(x + length + 4, y + 4, told))
        y += BAR + GAP
    titles = (_text(LEFT + at * (WIDTH + 80), 46, m[0]) for at, m in enumerate(METRICS))
    title = _text(10, 22, f"Fusions: {ablation.target}, {ablation.dtype}", 'font-size="14"')
    width = LEFT + len(METRICS) * (WIDTH + 80)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="{width}" height="{y}" '
        'fill="white"/>\n' + "\n".join([title, *titles, *parts]) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" {more}>{escape(text)}</text>'
