"""What became of every captured node, as data: which kernel it ended in, by which rules, what was
refused and why, what that saved. An account is self-sufficient: text, pictures and comparisons are
made from it alone, and its JSON can be read back.

The JSON ("schema": "convloom-ledger", "version": 2) has these fields; every time is {"us": number
or null, "how": "modelled" | "measured" | "not measured"}:

    model, target, dtype, batch   what was compiled, for what; batch is the largest one
    machine                       the GPU that modelled times are of; "" where the target is none,
                                  or emulated: then no time is modelled
    peaks                         what that GPU reaches at most (Peaks below); null for no GPU
    measured_on                   where measured times come from; "" when nothing was measured
    totals                        before (every captured op alone: passes="none") and after
    nodes                         one per captured node: Record below
    places                        kernels and what needs none (views, ...): KernelNode below
    edges                         [from, to]: names of places; data flows along them
    events                        accepted and refused rewrites in order: `ledger.Event`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from typing import Any

from ...errors import ArtifactError
from ..graph.ledger import Event
from ..graph.typed import Laws, Reader, one_of

SCHEMA, VERSION = "convloom-ledger", 2
MODELLED, MEASURED, NOT_MEASURED = "modelled", "measured", "not measured"
KERNEL, FALLBACK, VIEW, IN_PLACE = "kernel", "torch", "view", "in place"
REMOVED, CONSTANT, INPUT, OUTPUT = "removed", "constant", "input", "output"
KINDS = (
    "convolution", "linear", "pooling", "normalisation", "reduction", "pointwise", "movement",
    "other", INPUT, OUTPUT,
)  # fmt: skip
"""Families of ops, in the order of the legend; the page has a colour of each name."""
LONGEST_US = 1e15


@dataclass(frozen=True)
class Time:
    """Microseconds, and how they are known: modelled, measured or not measured (then None)."""

    us: float | None
    how: str

    def __str__(self) -> str:
        return self.how if self.us is None else f"{self.us:,.1f} us {self.how}"


UNKNOWN = Time(None, NOT_MEASURED)


def modelled(us: float | None) -> Time:
    """A modelled time; what has no model is unknown."""
    return UNKNOWN if us is None else Time(us, MODELLED)


@dataclass(frozen=True)
class Refusal:
    """A rule that declined a node, and why."""

    rule: str
    label: str
    reason: str

    def __str__(self) -> str:
        return f"{self.label}: {self.reason}" if self.label else f"{self.rule}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """What became of one captured node.

    kernel: the step of the plan that computes it, or why none does ("view", "in place", "removed",
    "constant"). place: where it is drawn. bytes_before: that a kernel of its own would read and
    write; bytes_saved: of these, what no kernel reads or writes any more. kernels_before: launches
    of a kernel of its own; kernels_saved: of these, what its fusion spares (one op of each kernel,
    a convolution where there is one, counts for the kernel). before: of a kernel of its own in its
    default configuration; after: its part of its kernel's time, in proportion to `before`.
    """

    node: str
    op: str
    module_path: str
    kernel: str
    place: str
    rules: tuple[str, ...]
    refused: tuple[Refusal, ...]
    bytes_before: int
    bytes_saved: int
    kernels_before: int
    kernels_saved: int
    before: Time
    after: Time
    part_of: str = ""
    """The composite op the node is a part of, whose figures stand at its last node."""


@dataclass(frozen=True)
class KernelNode:
    """A kernel of the plan, or something that needs none: a view, a buffer, an input or output.

    what: "kernel", "torch", "view", "in place", "input" or "output". kind: a family of ops, for
    colours. nodes: the captured nodes computed there, and those that vanished beside it.
    size_bytes: read and written if every tensor is touched once. config: as planned; modelled: of
    all its launches in the default configuration; measured: as planned; share: of the modelled time
    of the whole plan.
    """

    name: str
    what: str
    kind: str
    op: str
    computes: str
    module_path: str
    nodes: tuple[str, ...] = ()
    launches: int = 0
    size_bytes: int = 0
    config: str = ""
    modelled: Time = UNKNOWN
    measured: Time = UNKNOWN
    share: float = 0.0
    flops: int = 0
    bound: str = ""


@dataclass(frozen=True)
class Peaks:
    """What the GPU of modelled times reaches at most, as the cost model has it.

    tflops: 10^12 floating-point operations per second in matrix products of the network's dtype;
    memory_gbps, cache_gbps: 10^9 bytes per second from memory and from the L2 cache.
    """

    tflops: float
    memory_gbps: float
    cache_gbps: float


@dataclass(frozen=True)
class Totals:
    """The whole network with every captured op alone ("before") and as planned ("after")."""

    kernels_before: int
    kernels_after: int
    bytes_before: int
    bytes_after: int
    before: Time
    after: Time
    measured: Time
    torch_fallbacks: int


@dataclass(frozen=True)
class Account:
    """The whole account of one compilation; see the head of this file for its JSON."""

    model: str
    target: str
    dtype: str
    batch: int | None
    machine: str
    peaks: Peaks | None
    measured_on: str
    totals: Totals
    nodes: tuple[Record, ...]
    places: tuple[KernelNode, ...]
    edges: tuple[tuple[str, str], ...]
    events: tuple[Event, ...]

    @property
    def kernels(self) -> tuple[KernelNode, ...]:
        """Steps of the plan, in order; those of torch fallbacks included."""
        return tuple(place for place in self.places if place.what in (KERNEL, FALLBACK))

    def place(self, name: str) -> KernelNode:
        return next(place for place in self.places if place.name == name)

    def with_measured(self, times_us: Mapping[str, float], where: str) -> Account:
        """The account with measured times of steps, in microseconds, taken on `where`."""
        known = [place.name for place in self.kernels]
        places = tuple(
            replace(place, measured=Time(float(times_us[place.name]), MEASURED))
            if place.name in times_us
            else place
            for place in self.places
        )
        # A sum over some of the steps would be no time of the network.
        whole = sum(times_us.values()) if len(times_us) == len(known) else None
        total = UNKNOWN if whole is None else Time(whole, MEASURED)
        totals = replace(self.totals, measured=total)
        return replace(self, places=places, totals=totals, measured_on=where)

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema and version first."""
        return {"schema": SCHEMA, "version": VERSION, **asdict(self)}


def from_json(data: Any, source: str) -> Account:
    """The account that `to_json` wrote; `source` names it in errors.

    Raises: ArtifactError for another schema or version, or missing or wrong fields.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ArtifactError(
            f"'{source}': expected a ledger as `convloom explain NAME --json` writes it, got JSON "
            f"without \"schema\": \"{SCHEMA}\""
        )
    if data.get("version") != VERSION:
        raise ArtifactError(
            f"'{source}': expected version {VERSION} of the ledger's schema, got "
            f"{data.get('version')!r}; write it again with this convloom"
        )
    account: Account = Reader(source, loose=True, laws=_LAWS).read(Account, data, "ledger")
    if problem := _misfit(account):
        raise ArtifactError(f"'{source}' is damaged: {problem}")
    return account


_TIME = (lambda us: us is None or 0 <= us < LONGEST_US), f"microseconds below {LONGEST_US:g}"
_COUNT = (0).__le__, "0 or more"
_RATE = (lambda rate: 0 < rate < 1e9), "a rate above 0"
_LAWS: Laws = {
    Time: {"us": _TIME, "how": one_of(MODELLED, MEASURED, NOT_MEASURED)},
    KernelNode: {
        "what": one_of(KERNEL, FALLBACK, VIEW, IN_PLACE, INPUT, OUTPUT),
        "kind": one_of(*KINDS),
        "launches": _COUNT,
        "size_bytes": _COUNT,
        "share": (lambda share: 0 <= share < 1.001, "a share of 1"),
        "flops": _COUNT,
    },
    Peaks: dict.fromkeys(("tflops", "memory_gbps", "cache_gbps"), _RATE),
}
"""What must hold of fields beside their types."""


def _misfit(account: Account) -> str | None:
    """What does not fit together of an account's parts, or None."""
    nodes = Counter(record.node for record in account.nodes)
    places = Counter(place.name for place in account.places)
    inside = Counter(name for place in account.places for name in place.nodes)
    for what, counts in (("node", nodes), ("place", places), ("node in a place", inside)):
        if twice := next((name for name, count in counts.items() if count > 1), None):
            return f"{what} {twice[:80]!r} is there twice"
    named = [("place", record.place, places) for record in account.nodes]
    named += [("node", name, nodes) for name in inside]
    named += [("place", name, places) for edge in account.edges for name in edge]
    for what, name, known in named:
        if name not in known:
            return f"it names the {what} {name[:80]!r}, which it does not have"
    timed = chain(
        (time for place in account.places for time in (place.modelled, place.measured)),
        (time for record in account.nodes for time in (record.before, record.after)),
    )
    if any((time.us is None) != (time.how == NOT_MEASURED) for time in timed):
        return f"a time that is {NOT_MEASURED} has a value, or another one has none"
    readers: dict[str, list[str]] = {}
    for source, reader in account.edges:
        readers.setdefault(reader, []).append(source)
    try:
        TopologicalSorter(readers).prepare()
    except CycleError as error:
        return f"its places form a cycle: {' '.join(error.args[1])[:80]}"
    return None
