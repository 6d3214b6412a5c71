"""An account as text: the tree of modules, one line per captured op, then totals and refusals.

layer1                    32 ops, 32 -> 4 kernels, modelled 97.5 -> 14.1 us, saves 47.8 MB
  0                       12 ops, ...
    conv1                 conv2d      -> conv2d_5    modelled 2.6 -> 0.5 us, saves 401.4 kB
        by       fold-batch-norm; epilogue
        refused  conv-1x1: 512 channels do not fit one tile (at most 128)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import account as acc
from .account import Account, KernelNode, Record, Time


@dataclass
class Module:
    """One module: its own ops and its sub-modules, in order of first use, and all ops within."""

    name: str
    inside: list[Record | Module] = field(default_factory=list)
    modules: dict[str, Module] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


def module_tree(account: Account) -> Module:
    top = Module("")
    for record in account.nodes:
        module = top
        for part in filter(None, record.module_path.split(".")):
            if part not in module.modules:
                module.modules[part] = Module(part)
                module.inside.append(module.modules[part])
            module = module.modules[part]
            module.records.append(record)
        module.inside.append(record)
    return top


def to_text(account: Account) -> str:
    """Modules with their ops, kernels without a captured op, totals, refusals, rules."""
    lines = [times_note(account), ""]
    writer = _Writer(account)
    for item in module_tree(account).inside:
        lines += writer.item("(top)", item, "")
    lines += ["", *_conversions(account), *totals_lines(account), "", *_refusals(account)]
    lines += ["", *_rules(account)]
    return "\n".join(lines).rstrip() + "\n"


def times_note(account: Account) -> str:
    """Which machines the account's times are of."""
    note = f"{account.target} is not a GPU: no times are modelled"
    if account.machine:
        note = f"modelled times are for {account.machine}"
    where = account.measured_on
    return f"{note}; {f'measured times are from {where}' if where else 'nothing was measured'}"


def kernel_times(place: KernelNode) -> list[str]:
    """A kernel's modelled and measured time in words; without a model, a measured one only."""
    if place.modelled.us is None:
        return [] if place.measured.us is None else [str(place.measured)]
    return [str(place.modelled), str(place.measured)]


class _Writer:
    """Lines of modules and ops, in columns that fit the account."""

    def __init__(self, account: Account) -> None:
        self.places = {place.name: place for place in account.places}
        self.is_modelled = bool(account.machine)
        self.labels = labels(account)
        self.paths = {r.node: r.module_path for r in account.nodes if r.module_path}
        self.name_columns = min(32, max([8, *(
            2 * r.module_path.count(".")
            + max(len(r.module_path.rpartition(".")[2]), len(r.node) + 4)
            for r in account.nodes
        )]))  # fmt: skip
        self.op_columns = max([4, *(len(record.op) for record in account.nodes)])
        self.kernel_columns = max([4, *(len(record.kernel) for record in account.nodes)])

    def item(self, name: str, item: Record | Module, indent: str) -> list[str]:
        if isinstance(item, Module):
            return self.module(item, indent)
        return self.op(name, item, indent)

    def module(self, module: Module, indent: str) -> list[str]:
        """A module's heading with its totals, then what is in it; one op needs no heading."""
        if len(module.inside) == 1 and isinstance(module.inside[0], Record):
            return self.op(module.name, module.inside[0], indent)
        left = f"{indent}{module.name}".ljust(self.name_columns)
        lines = [f"{left}  {_module_totals(module.records, self.is_modelled)}"]
        for item in module.inside:
            name = "" if isinstance(item, Module) else f"({item.node})"
            lines += self.item(name, item, indent + "  ")
        return lines

    def op(self, name: str, record: Record, indent: str) -> list[str]:
        """One line, and below it rules and refusals."""
        left = f"{indent}{name}".ljust(self.name_columns)
        op = record.op.ljust(self.op_columns)
        kernel = record.kernel.ljust(self.kernel_columns)
        lines = [f"{left}  {op} -> {kernel}  {self._figures(record)}".rstrip()]
        if record.rules:
            named = (self.labels.get(rule) or rule for rule in record.rules)
            lines.append(f"{indent}    by       {'; '.join(dict.fromkeys(named))}")
        by_reason: dict[str, list[str]] = {}
        for refusal in record.refused:
            by_reason.setdefault(refusal.reason, []).append(refusal.label or refusal.rule)
        for reason, rules in by_reason.items():
            shown = "; ".join(dict.fromkeys(rules))
            lines.append(f"{indent}    refused  {shown}: {with_paths(reason, self.paths)}")
        return lines

    def _figures(self, record: Record) -> str:
        if record.part_of:
            return f"a part of {record.part_of}"
        shown = []
        times = record.before, record.after
        if self.is_modelled and (acc.UNKNOWN in times or any(time.us for time in times)):
            shown.append(change_text(*times))
        if record.bytes_saved > 0:
            shown.append(f"saves {size_text(record.bytes_saved)}")
        elif record.bytes_saved:
            shown.append(f"moves {size_text(-record.bytes_saved)} more")
        if record.kernels_saved:
            also = "" if record.bytes_saved > 0 else "saves "
            shown.append(f"{also}{counted(record.kernels_saved, 'kernel')}")
        place = self.places.get(record.kernel)
        if place is not None and place.measured.us is not None:
            shown.append(f"its kernel {place.measured}")
        return ", ".join(shown)


def labels(account: Account) -> dict[str, str]:
    """The short name of every rule that has one."""
    return {event.rule: event.label for event in account.events if event.label}


def with_paths(reason: str, paths: dict[str, str]) -> str:
    """A reason in which every captured node is followed by its module path."""
    named = re.compile(r"%?\b[A-Za-z_]\w*\b")

    def show(found: re.Match[str]) -> str:
        path = paths.get(found[0].removeprefix("%"))
        # Ops are called as the first node of their kind: such words stay words.
        told = path is not None and (found[0].startswith("%") or found[0][-1].isdigit())
        return f"{found[0]} ({path})" if told else found[0]

    return named.sub(show, reason)


def _module_totals(records: list[Record], is_modelled: bool) -> str:
    before = sum(record.kernels_before for record in records)
    after = before - sum(record.kernels_saved for record in records)
    told = [counted(len(records), "op"), f"{before} -> {after} kernels"]
    if is_modelled:
        sides = ([r.before for r in records], [r.after for r in records])
        sums = (acc.modelled(sum(time.us or 0.0 for time in side)) for side in sides)
        told.append(change_text(*sums))
    told.append(f"saves {size_text(sum(record.bytes_saved for record in records))}")
    return ", ".join(told)


def change_text(before: Time, after: Time) -> str:
    """Two times; the label once where they share it."""
    if before.how == after.how and before.us is not None and after.us is not None:
        return f"{after.how} {before.us:,.1f} -> {after.us:,.1f} us"
    return f"{before} -> {after}"


def counted(count: int, noun: str) -> str:
    """ "1 kernel", "2 kernels"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size_text(size_bytes: int) -> str:
    """A size for people; 1 MB is 10**6 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:,.1f} {unit}"
    return counted(size_bytes, "byte")


def _conversions(account: Account) -> list[str]:
    """Kernels that no captured op asked for."""
    lines = [
        f"  {place.name}: {place.computes}; "
        + ", ".join([*kernel_times(place), size_text(place.size_bytes)])
        for place in account.kernels
        if not place.nodes
    ]
    return ["kernels of no captured op (conversions and copies)", *lines, ""] if lines else []


def totals_lines(account: Account) -> list[str]:
    """The whole network with every op alone and as planned."""
    t = account.totals
    rows = [
        ("", "every op alone", "this plan"),
        ("kernels", str(t.kernels_before), str(t.kernels_after)),
        ("bytes read and written", size_text(t.bytes_before), size_text(t.bytes_after)),
    ]
    if account.machine:
        rows.append(("modelled time", us_text(t.before), us_text(t.after)))
    if account.machine or account.measured_on:
        rows.append(("measured time", acc.NOT_MEASURED, us_text(t.measured)))
    if t.torch_fallbacks:
        count = str(t.torch_fallbacks)
        rows.append(("torch fallbacks (in no figure above)", count, count))
    return side_by_side(rows)


def side_by_side(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lines of a name and its two figures."""
    left, middle, right = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"{a:<{left}}  {b:>{middle}}  {c:>{right}}".rstrip() for a, b, c in rows]


def us_text(time: Time) -> str:
    """A time in a line that says already whether it is modelled or measured."""
    return time.how if time.us is None else f"{time.us:,.1f} us"


def refusals_by_reason(account: Account) -> list[tuple[int, str, str]]:
    """(count, rule's label or name, reason) of refused matches, the most frequent first; of reasons
    that differ in names and times only, the first as an example."""
    paths = {r.node: r.module_path for r in account.nodes if r.module_path}
    ranked = sorted(refusals(account).items(), key=lambda item: (-len(item[1]), item[0]))
    return [(len(told), rule, example_of(told, paths)) for (rule, _), told in ranked]


def refusals(account: Account) -> dict[tuple[str, str], list[str]]:
    """The reasons of refused matches, by the rule's label or name and by what they have in common
    where names of nodes and modelled times are left out."""
    named, short = _names_of_nodes(account), labels(account)
    found: dict[tuple[str, str], list[str]] = {}
    for event in account.events:
        if not event.accepted:
            common = named.sub("..", re.sub(r"[\d,.]+ us\b", ".. us", event.reason))
            found.setdefault((short.get(event.rule, event.rule), common), []).append(event.reason)
    return found


def example_of(reasons: Sequence[str], paths: dict[str, str]) -> str:
    """The first of some reasons, and whether there are others; with module paths by node."""
    others = ", for example" if len(set(reasons)) > 1 else ""
    return f"{with_paths(reasons[0], paths)}{others}"


def _names_of_nodes(account: Account) -> re.Pattern[str]:
    """Finds nodes in reasons. Nodes that passes made and consumed again are known by the form of
    their names only; the first of each op is called like the op, which may stand for itself."""
    names = {record.node for record in account.nodes} | {place.name for place in account.places}
    names |= {event.into for event in account.events} - {""}
    made = r"(?!sm_)[a-z][a-z0-9_]*_[0-9]+"
    numbered = {name for name in names if name[-1].isdigit()}
    bare = sorted(names - numbered, key=len, reverse=True)
    # Few names are of another form; all of them as alternatives would be tried at every letter.
    formed = re.compile(rf"{made}(?:\.{made})?")
    others = sorted((n for n in numbered if not formed.fullmatch(n)), key=len, reverse=True)
    several = "|".join([*map(re.escape, others), formed.pattern])
    first = "|".join(map(re.escape, bare)) or "(?!)"
    before, output = r"(?:%|^|(?<=\bby )|(?<=\bat ))", r"\b(?:\.\d+\b)?"
    return re.compile(rf"%?\b(?:{several}){output}|{before}(?:{first}){output}(?![-\w])")


def _refusals(account: Account) -> list[str]:
    counts = refusals_by_reason(account)
    told = [f"{n:>5} x  {rule}: {reason}" for n, rule, reason in counts]
    return ["refused", *told] if told else ["nothing was refused"]


def _rules(account: Account) -> list[str]:
    """The equations of the rules that stand above by their short names."""
    shown = sorted((label, rule) for rule, label in labels(account).items())
    width = max((len(label) for label, _ in shown), default=0)
    return ["rules", *(f"  {label:<{width}}  {rule}" for label, rule in shown)] if shown else []
