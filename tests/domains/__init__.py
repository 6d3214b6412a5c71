"""The problems that tests and benchmarks draw for every op: one file per file of `kernels/`.

A file gives `DOMAINS`, a `Domain` for each op of its namesake by the op's name. Files are found by
being there.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from convloom.kernels.contract.op import Op

from ..properties.domain import Domain


def _collected() -> dict[str, Domain]:
    domains: dict[str, Domain] = {}
    for path in sorted(Path(__file__).parent.glob("*/*.py")):
        module: Any = import_module(f".{path.parent.name}.{path.stem}", __name__)
        given = getattr(module, "DOMAINS", {})
        assert not domains.keys() & given.keys(), f"{path}: a second domain of one op"
        domains.update(given)
    return domains


DOMAINS = _collected()
"""By the name of the op."""


def domain_of(op: Op) -> Domain:
    """The domain of an op. Raises: LookupError where it has none, with what to do."""
    if op.name not in DOMAINS:
        raise LookupError(
            f'op {op.name} has no domain: add "{op.name}": Domain(...) to DOMAINS in the file of '
            "tests/domains that is named as the op's file in kernels"
        )
    return DOMAINS[op.name]


__all__ = ["DOMAINS", "Domain", "domain_of"]
