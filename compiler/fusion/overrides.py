"""What the user forced and forbade: `compile(force=..., forbid=...)`.

An entry is a rule's label ("conv-pool"), a module path in which `*` stands for anything
("layer1.*"), or both ("conv-pool@layer1.*"). A forbidden fusion is refused with that reason. A
forced one is made although the cost model would not; what the kernels cannot express stays refused,
and an entry that nothing came of is an error that gives the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ...errors import InvalidInputError, near_names
from ..graph.ir import CompileTarget, Graph, Node
from ..graph.ledger import Ledger


@dataclass(frozen=True)
class Override:
    """What the user asked of one match: the forcing entry, or why it is refused."""

    force: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Labels:
    """The label of every fusion by its rule's name; heavy: the rules of several heavy ops, the ones
    that an entry without a label asks for."""

    all: dict[str, str]
    heavy: frozenset[str]


def of(goal: CompileTarget | None, label: str, nodes: Iterable[Node]) -> Override:
    """The override of a match of the rule with that label; rules without one are no fusions.

    Raises: InvalidInputError where the match is both forced and forbidden.
    """
    if goal is None or not label or not (goal.force or goal.forbid):
        return Override()
    paths = tuple(dict.fromkeys(node.module_path for node in nodes))
    force = next((e for e in goal.force if concerns(e, label, paths)), None)
    forbid = next((e for e in goal.forbid if concerns(e, label, paths)), None)
    if force and forbid:
        raise InvalidInputError(
            f"force={force!r} and forbid={forbid!r} contradict each other at {label} of "
            f"{', '.join(paths)}; drop one, or narrow it as LABEL@MODULE.PATH"
        )
    return Override(force, f"forbidden by forbid={forbid!r}" if forbid else None)


def concerns(entry: str, label: str, paths: Iterable[str]) -> bool:
    """Whether an entry is about a rule applied in one of the modules."""
    rule, at, path = entry.rpartition("@")
    if at:
        return rule == label and any(fnmatchcase(p, path) for p in paths)
    return entry == label or any(fnmatchcase(p, entry) for p in paths)


def check(captured: Graph, force: tuple[str, ...], forbid: tuple[str, ...], labels: Labels) -> None:
    """Refuses entries that can concern nothing.

    Raises: InvalidInputError for an entry that is neither a label nor a module path, with the near
    names, and for one that is both forced and forbidden.
    """
    paths = tuple(dict.fromkeys(node.module_path for node in captured.compute_nodes()))
    known = tuple(dict.fromkeys(labels.all.values()))
    for name, entries in (("force", force), ("forbid", forbid)):
        for entry in entries:
            _check_entry(name, entry, known, paths)
    for entry in force:
        if entry in forbid:
            raise InvalidInputError(f"{entry!r} is both forced and forbidden; drop one")


def _check_entry(
    argument: str, entry: object, labels: tuple[str, ...], paths: tuple[str, ...]
) -> None:
    if not isinstance(entry, str):
        raise InvalidInputError(f"{argument}: expected names, got {entry!r}")
    rule, at, path = entry.rpartition("@")
    if at and rule not in labels:
        raise InvalidInputError(
            f"{argument}={entry!r}: unknown fusion {rule!r}; {near_names(rule, labels)}"
        )
    if not at and entry in labels:
        return
    if not any(fnmatchcase(known, path) for known in paths):
        modules = tuple(known for known in paths if known)
        names = modules if at else (*labels, *modules)
        kind = "module path" if at else "fusion or module path"
        raise InvalidInputError(
            f"{argument}={entry!r}: no {kind} of that name; {near_names(path, names)}"
        )


def check_forced(captured: Graph, force: tuple[str, ...], ledger: Ledger, labels: Labels) -> None:
    """Refuses to go on where a forced fusion was not made.

    Raises: InvalidInputError with the reasons that the ledger has.
    """
    paths = {node.name: node.module_path for node in captured.nodes()}
    for entry in force:
        reasons = []
        made = False
        for event in ledger.events:
            if event.rule not in labels.all:
                continue
            label = labels.all[event.rule]
            where = {paths.get(name, "") for name in event.nodes}
            asked = entry in labels.all.values() or "@" in entry or event.rule in labels.heavy
            if asked and concerns(entry, label, where):
                made = made or event.accepted
                reasons.append(f"{event.rule}: {event.reason}")
        if not made:
            why = "; ".join(dict.fromkeys(reasons)) or "no fusion matches there"
            raise InvalidInputError(f"force={entry!r}: cannot be fused: {why}")


CONCAT_RULE = "concat(f(x), ...) => f writes its slice"


CONCAT_LABEL = "concat"
