"""Why each captured node ended in the kernel it did: what a ledger and a plan say to people.

What fusion saved in bytes, kernels and modelled time is worked out when somebody asks (`account`,
`to_json`, `to_text`), from the graphs and the plan alone: nothing depends on what was cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...errors import GraphError, InvalidInputError, near_names
from ..graph.ledger import Ledger
from ..graph.memory import on_cpu
from ..plan.plan import Plan
from . import account, account_text
from .account import Account
from .account_text import counted


@dataclass
class Report(Ledger):
    """A ledger, and once the plan is made the account of what became of each captured node.

    measured: microseconds of steps, on `measured_on`. read: the account, where the report was read
    back rather than written by passes.
    """

    plan: Plan | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = ""
    read: Account | None = None

    def with_measured(self, times_us: Mapping[str, float], where: str) -> Report:
        """The report with measured microseconds of steps (`Executable.profile`), and where.

        Raises: InvalidInputError for a step that the plan does not have.
        """
        steps = [step.name for step in self.plan.steps] if self.plan else []
        steps += [place.name for place in self.read.kernels] if self.read else []
        for name in times_us:
            if name not in steps:
                raise InvalidInputError(
                    f"measured times: the plan has no step {name!r}; {near_names(name, steps)}"
                )
        return replace(self, measured=dict(times_us), measured_on=where)

    def with_launches(self, times_us: Iterable[tuple[str, float]], where: str) -> Report:
        """`with_measured`, of launches by their step's name: those of one step are added up."""
        summed: dict[str, float] = {}
        for name, us in times_us:
            summed[name] = summed.get(name, 0.0) + us
        return self.with_measured(summed, where)

    def account(self) -> Account:
        """What became of every node, what that saved, and the graph of kernels.

        Raises: GraphError before the plan is made.
        """
        if not self.measured:
            return self._account
        return self._account.with_measured(self.measured, self.measured_on)

    @cached_property
    @on_cpu
    def _account(self) -> Account:
        if self.read is not None:
            return self.read
        if self.snapshot is None or self.plan is None:
            raise GraphError("the ledger has no plan yet; ask the ledger of an executable")
        # Files are read where no kernel can be compiled; their accounts are written already.
        from .attribution import make_account

        return make_account(self, self.snapshot, self.plan)

    def to_json(self) -> dict[str, Any]:
        """The account as plain data; `account.py` documents its fields."""
        return self.account().to_json()

    @staticmethod
    def from_json(data: Any, source: str = "ledger") -> Report:
        """The report that `to_json` wrote.

        Raises: ArtifactError for another schema or version, or missing or wrong fields.
        """
        read = account.from_json(data, source)
        return Report(list(read.events), read=read)

    def explain(self, name: str, counts: Mapping[str, int]) -> str:
        """The report as text, under the counts of the plan of the network `name`."""
        arena, total = counts["arena_bytes"], counts["activation_bytes"]
        ratio = f", {arena / total:.0%}" if total else ""
        return (
            f"{name} on {self.account().target}: {self.summary_line(counts)}\n"
            f"arena {arena:,} bytes of {total:,} bytes of activations{ratio}\n\n{self.to_text()}"
        )

    def summary_line(self, counts: Mapping[str, int]) -> str:
        """The launches of every op alone and of the plan, by its counts, in one line."""
        alone, kernels = self.account().totals.kernels_before, counts["kernels"]
        convs = counted(counts["convs"], "conv")
        told = f"{alone} -> {kernels} kernels (every op alone -> this plan), {convs}"
        fallbacks = counts["torch_fallbacks"]
        return f"{told}; {counted(fallbacks, 'torch fallback')}" if fallbacks else told

    def to_text(self) -> str:
        """The account grouped by module, with rules, refusals and totals."""
        return account_text.to_text(self.account())
