"""Two accounts of one model side by side: kernels that came and went, ops that changed kernels and
by which rules, refusals, totals.

A kernel is known by its op and the captured ops in it, not by its name: names count up while passes
run. `before` and `after` are what the caller compares, for example `passes="none"` and the default,
or yesterday's JSON and today's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx

from ...errors import InvalidInputError
from . import account as acc
from .account import Account, Record
from .account_text import counted, example_of, labels, refusals, side_by_side, size_text, us_text

SCHEMA, VERSION = "convloom-ledger-diff", 1
SHOWN = 6
"""Names listed in an error message before it says how many more there are."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of one side: its op, the captured ops it computes, its modelled time."""

    op: str
    nodes: tuple[str, ...]
    time: acc.Time

    def __str__(self) -> str:
        inside = ", ".join(self.nodes) or "no captured op"
        time = "" if self.time.us is None else f", {self.time}"
        return f"{self.op}({inside}){time}"


@dataclass(frozen=True)
class Change:
    """A captured op that is computed together with others than before.

    before, after: the op of its kernel, or why it has none; with_before, with_after: the other
    captured ops there; rules: short names of the rules that only the second side applied to it;
    dropped: of those that only the first side did.
    """

    node: str
    op: str
    module_path: str
    before: str
    with_before: tuple[str, ...]
    after: str
    with_after: tuple[str, ...]
    rules: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """What is compared: its name, and the network's figures."""

    name: str
    target: str
    dtype: str
    batch: int | None
    machine: str
    kernels: int
    size_bytes: int
    time: acc.Time
    measured: acc.Time
    torch_fallbacks: int


@dataclass(frozen=True)
class Difference:
    """What differs; refusals as (count, rule, reason)."""

    model: str
    before: Side
    after: Side
    vanished: tuple[Kernel, ...]
    appeared: tuple[Kernel, ...]
    changes: tuple[Change, ...]
    gone_refusals: tuple[tuple[int, str, str], ...]
    new_refusals: tuple[tuple[int, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema and version first."""
        return {"schema": SCHEMA, "version": VERSION, **asdict(self)}


def compare(before: Account, after: Account, names: tuple[str, str]) -> Difference:
    """The difference between two accounts of one model; `names` are what the user calls them.

    Raises: InvalidInputError where the captured ops are not the same.
    """
    ops = [{(r.node, r.op, r.module_path) for r in side.nodes} for side in (before, after)]
    if ops[0] != ops[1]:
        sides = zip(names, (ops[0] - ops[1], ops[1] - ops[0]), strict=True)
        told = [f"only in {name}: {_some(extra)}" for name, extra in sides if extra]
        raise InvalidInputError(
            f"--diff: expected two accounts of one model, got {before.model} ({names[0]}) and "
            f"{after.model} ({names[1]}); captured ops {'; '.join(told)}"
        )
    old, new = (list(_kernels(side).values()) for side in (before, after))
    return Difference(
        model=after.model,
        before=_side(before, names[0]),
        after=_side(after, names[1]),
        vanished=tuple(_missing(old, new)),
        appeared=tuple(_missing(new, old)),
        changes=tuple(_changes(before, after)),
        gone_refusals=_only(before, after),
        new_refusals=_only(after, before),
    )


def _some(ops: Iterable[tuple[str, str, str]]) -> str:
    ordered = sorted(ops)
    shown = ", ".join(f"{node} ({op} {path})" for node, op, path in ordered[:SHOWN])
    more = len(ordered) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _side(account: Account, name: str) -> Side:
    t = account.totals
    return Side(
        name, account.target, account.dtype, account.batch, account.machine,
        t.kernels_after, t.bytes_after, t.after, t.measured, t.torch_fallbacks,
    )  # fmt: skip


# Kernels and groups.


def _kernels(account: Account) -> dict[str, Kernel]:
    """The kernels by name, with their captured ops but for those that vanished beside them."""
    members: dict[str, list[str]] = {}
    for record in account.nodes:
        members.setdefault(record.kernel, []).append(record.node)
    return {
        place.name: Kernel(place.op, tuple(members.get(place.name, ())), place.modelled)
        for place in account.kernels
    }


def _missing(kernels: Sequence[Kernel], others: Sequence[Kernel]) -> Iterator[Kernel]:
    """Kernels that the other side does not have, each as often as it lacks them."""
    left = Counter((kernel.op, kernel.nodes) for kernel in others)
    for kernel in kernels:
        left[kernel.op, kernel.nodes] -= 1
        if left[kernel.op, kernel.nodes] < 0:
            yield kernel


def _groups(account: Account) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What each captured op is computed by, and with which others."""
    kernels, groups = _kernels(account), {}
    for record in account.nodes:
        kernel = kernels.get(record.kernel, Kernel(record.kernel, (), acc.UNKNOWN))
        groups[record.node] = kernel.op, tuple(n for n in kernel.nodes if n != record.node)
    return groups


def _changes(before: Account, after: Account) -> Iterator[Change]:
    old, new = _groups(before), _groups(after)
    earlier = {record.node: record for record in before.nodes}
    short = labels(before) | labels(after)
    for record in after.nodes:
        node = record.node
        if old[node] == new[node]:
            continue
        then, now = (_rules(each, short) for each in (earlier[node], record))
        yield Change(
            node, record.op, record.module_path, *old[node], *new[node],
            tuple(rule for rule in now if rule not in then),
            tuple(rule for rule in then if rule not in now),
        )


def _rules(record: Record, short: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(short.get(rule) or rule for rule in record.rules))


def _only(account: Account, other: Account) -> tuple[tuple[int, str, str], ...]:
    """Refusals by reason that the other side has less often, and how much less."""
    paths = {r.node: r.module_path for r in account.nodes if r.module_path}
    theirs = refusals(other)
    found = [
        (len(told) - len(theirs.get((rule, common), ())), rule, example_of(told, paths))
        for (rule, common), told in refusals(account).items()
    ]
    return tuple(sorted((item for item in found if item[0] > 0), key=lambda item: -item[0]))


# Text.


def to_text(difference: Difference) -> str:
    """Totals side by side, then kernels, ops and refusals."""
    d = difference
    lines = [f"{d.model}: {d.before.name} -> {d.after.name}", "", *_totals(d), ""]
    vanished, appeared = counted(len(d.vanished), "kernel"), counted(len(d.appeared), "kernel")
    lines += [f"{vanished} vanished, {appeared} appeared in their place", *_kernel_lines(d), ""]
    lines.append(f"{counted(len(d.changes), 'op')} changed kernels")
    for change in d.changes:
        lines += _change_lines(change)
    for heading, declined in (("gone", d.gone_refusals), ("new", d.new_refusals)):
        lines += ["", f"{counted(sum(n for n, _, _ in declined), 'refusal')} {heading}"]
        lines += [f"{count:>5} x  {rule}: {reason}" for count, rule, reason in declined]
    return "\n".join(lines) + "\n"


def _kernel_lines(d: Difference) -> Iterator[str]:
    """Kernels that vanished, each followed by those that compute its ops now."""
    shares = nx.Graph()
    for mark, kernels in (("-", d.vanished), ("+", d.appeared)):
        for at, kernel in enumerate(kernels):
            shares.add_node((mark, at))
            shares.add_edges_from(((mark, at), node) for node in kernel.nodes)
    for group in nx.connected_components(shares):
        numbers = sorted(each for each in group if isinstance(each, tuple))
        yield from (f"  - {d.vanished[at]}" for mark, at in numbers if mark == "-")
        yield from (f"  + {d.appeared[at]}" for mark, at in numbers if mark == "+")


def _totals(d: Difference) -> list[str]:
    rows: dict[str, Callable[[Side], str]] = {
        "": lambda side: side.name,
        "target": lambda side: f"{side.target} {side.dtype}",
        "batch": lambda side: str(side.batch),
        "kernels": lambda side: str(side.kernels),
        "bytes read and written": lambda side: size_text(side.size_bytes),
        "modelled time": lambda side: us_text(side.time),
        "measured time": lambda side: us_text(side.measured),
        "modelled for": lambda side: side.machine or "-",
        "torch fallbacks": lambda side: str(side.torch_fallbacks),
    }
    shown = [(name, show(d.before), show(d.after)) for name, show in rows.items()]
    # What neither side has, times where both are for no GPU, is left out.
    lines = side_by_side([row for row in shown if set(row[1:]) - {"-", acc.NOT_MEASURED}])
    if any(getattr(d.before, f) != getattr(d.after, f) for f in ("target", "dtype", "batch")):
        lines.append("target, dtype or batch differ: times and bytes are not for the same work")
    return lines


def _change_lines(change: Change) -> list[str]:
    where = f"{change.module_path} " if change.module_path else ""
    lines = [f"  {where}{change.op} ({change.node})"]
    for word, by, others in (
        ("was", change.before, change.with_before),
        ("is", change.after, change.with_after),
    ):
        beside = f" with {', '.join(others)}" if others else ""
        lines.append(f"      {word:<8} {by}{beside}")
    for word, rules in (("by", change.rules), ("without", change.dropped)):
        if rules:
            lines.append(f"      {word:<8} {'; '.join(rules)}")
    return lines
