"""One row per op of the registry, at a shape it typically has: `python -m benchmarks.ops`.

fp16, sm_90, default configurations. Bytes: the least that must be moved, every tensor touched once,
and how many times that the programs really fetch through the L2 cache and write, counted in the
interpreter (`traffic.py`) on a smaller problem under the same configuration. Times are modelled
(`kernels/contract/cost_model.py`: a ranking, no promise); the measured column is filled where a GPU
is present. Results go to benchmarks/results/ops.json and ops.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from convloom.compiler.tuning.cuda import CudaBackend
from convloom.kernels import registry
from convloom.kernels.contract import cost_model, targets
from convloom.kernels.contract.op import Config, Op, Operand, Problem
from convloom.tests.domains import domain_of

from .machine_info import git_hash
from .traffic import READ, WRITE, fetched_bytes, traffic

RESULTS = Path(__file__).resolve().parent / "results"
TARGET = targets.parse("cuda:sm_90")
COUNTED = {"N": 1, "image": (28, 28), "result": (14, 14), "shape": (1, 256, 14, 14)}
"""What a draw is made smaller to, for counting."""
TYPICAL: dict[str, Any] = {
    "N": 32, "image": (56, 56), "result": (28, 28), "shape": (32, 256, 28, 28), "leading": (32,),
    "C": 64, "K": 64, "C1": 64, "C2": 64, "D": 64, "M": 64, "E": 256, "O": 64, "L": None,
    "filter": (3, 3), "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
    "groups": 1, "ceil_mode": False, "layout": None, "nhwc": True, "dim": 1,
}  # fmt: skip
"""The value of a domain's range, by its name, where the op has none of its own below."""
VOLUME: dict[str, Any] = {
    "N": 8, "image": (16, 28, 28), "kernel": (3, 3, 3), "filter": (3, 3, 3),
    "stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1),
}  # fmt: skip
HALVED: dict[str, Any] = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
STEM: dict[str, Any] = {
    "C": 3, "image": (224, 224), "filter": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3),
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "conv2d": {"padding": (1, 1, 1, 1)},
    "conv_rearrange": {"r": 2, "padding": (1, 1, 1, 1)},
    "conv_mean": {"image": (7, 7), "filter": (1, 1), "K": 256, "C": 64},
    "stem": STEM,
    "stem_input": {**STEM, "left": 3, "right": 3},
    "linear": {"C": 4096, "K": 1000},
    "head": {"C": 2048, "image": (7, 7), "widths": (1000,), "average": True},
    "small_net": {
        "C": 1, "image": (32, 32), "filters": (6, 16), "filter": (5, 5), "padding": (0, 0, 0, 0),
        "average": True, "widths": (120, 84, 10),
    },
    "bmm": {"shape": (2, 8, 196, 64, 196), "read": ("heads", "heads")},
    "permute": {"seed": 3},
    "flip": {"dims": (3,)},
    "gather": {"shape": (1000, 512), "dim": 0, "count": 3136, "repeats": "index"},
    "slice": {"cut": 1},
    "concat": {"count": 2, "seed": 2},
    "max_pool2d": {"stride": (2, 2), "image": (112, 112)},
    "max_pool2d_with_indices": HALVED,
    "max_unpool2d": {**HALVED, "more": 0},
    "avg_pool2d": HALVED,
    "lp_pool2d": HALVED,
    "max_pool3d": {"stride": (2, 2, 2)},
    "avg_pool3d": {"kernel": (2, 2, 2), "stride": (2, 2, 2), "padding": (0, 0, 0)},
    **{f"adaptive_{kind}_pool2d": {"size": (7, 7)} for kind in ("avg", "max")},
    **{f"adaptive_{kind}_pool3d": {"size": (2, 7, 7)} for kind in ("avg", "max")},
    "local_response_norm": {"size": 5},
    "upsample_nearest": {"image": (28, 28), "scale": 2.0},
    "upsample_linear": {"image": (28, 28), "scale": 2.0},
    "lrn_pool": {"size": 5, "stride": (2, 2), "padding": (0, 0)},
}
"""Values that an op has of its own."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv2d 1x1": ("conv2d", {"filter": (1, 1), "padding": (0, 0, 0, 0), "K": 256}),
    "conv2d depthwise": ("conv2d", {"depthwise": True, "C": 128}),
}
"""Further rows: ops whose kernel depends on the attributes."""
LONGEST_PROBLEM = 240
SMALL_MB = 10.0
"""Problems up to this size are counted as they are."""


@dataclass(frozen=True)
class Row:
    """One op. reads, writes: bytes really moved, as multiples of the least."""

    op: str
    problem: str
    modelled_us: float
    measured_us: float | None
    least_mb: float
    reads: float
    writes: float


def draw_of(op: Op, values: Mapping[str, Any]) -> dict[str, Any]:
    """A draw of the op's domain with the values given by name, else the first of a range."""
    ranges = domain_of(op).ranges
    shaped: dict[str, Any] = {}
    for name, known in ranges.items():
        wanted, first = values.get(name), known[0]
        fits = name == "shape" or _alike(wanted, first)
        shaped[name] = wanted if wanted is not None and fits else first
    return shaped


def _alike(wanted: Any, known: Any) -> bool:
    """Whether a value is of the kind that a range holds: a window of four numbers is no pair."""
    if isinstance(known, tuple):
        return isinstance(wanted, tuple) and (len(wanted) == len(known) or len(known) < 2)
    return isinstance(wanted, type(known)) or known is None


def problem_of(op: Op, values: Mapping[str, Any]) -> Problem | None:
    """The op at a shape, in half precision, every tensor in a buffer of its own."""
    is_volume = any(
        isinstance(known[0], tuple) and len(known[0]) == 3
        for name, known in domain_of(op).ranges.items() if name in ("image", "kernel", "stride")
    )  # fmt: skip
    own = {**(VOLUME if is_volume else {}), **SHAPES.get(op.name, {})}
    built = domain_of(op).build(draw_of(op, {**TYPICAL, **own, **values}))
    if built is None:
        return None
    attributes, drawn = built
    half = tuple(
        spec.with_(dtype=torch.float16) if spec.dtype is torch.float32 else spec for spec in drawn
    )
    outputs = op.infer(attributes, half)
    return Problem(
        op.name, attributes, tuple(map(Operand.dense, half)), tuple(map(Operand.dense, outputs))
    )


def typical(op: Op, values: Mapping[str, Any]) -> Problem:
    """The op at its typical shape, or the first of its domain's interesting ones."""
    problem = problem_of(op, values)
    for draw in domain_of(op).interesting:
        problem = problem or problem_of(op, draw)
    assert problem is not None, f"{op.name}: no typical shape; name one in SHAPES"
    return problem


def counted(
    op: Op, problem: Problem, tile: Config, values: Mapping[str, Any]
) -> tuple[Problem, Config]:
    """The op at a shape small enough to count, under a configuration of the typical one."""
    if op.cost(problem).size_bytes <= SMALL_MB * 1e6:
        return problem, tile
    smaller: dict[str, Any] = {**values, **COUNTED}
    if any(len(known[0]) == 3 for known in [domain_of(op).ranges.get("image", ((),))]):
        smaller["image"] = (4, 14, 14)
    problem = problem_of(op, smaller) or problem
    usual = op.default(problem, TARGET)
    same_kernel = dict(tile.blocks).keys() == dict(usual.blocks).keys()
    fits = same_kernel and op.legal(problem, tile, TARGET) is None
    return problem, tile if fits else usual


def row(name: str, backend: Any = None) -> Row:
    """The figures of one op, or of a variant of one."""
    of, values = VARIANTS.get(name, (name, {}))
    op = registry.get(of)
    problem = typical(op, values)
    tile = op.default(problem, TARGET)
    small, chosen = counted(op, problem, tile, values)
    touched, least = traffic(small, chosen, TARGET), op.cost(small)
    shown = ", ".join(str(operand.spec) for operand in problem.inputs)
    measured = backend.trial(problem, tile).time_us if backend else None
    return Row(
        name,
        f"{shown}; {problem.attributes}".strip("; "),
        round(cost_model.problem_us(op, problem, TARGET), 1),
        measured,
        round(op.cost(problem).size_bytes / 1e6, 2),
        round(fetched_bytes(touched, READ) / max(least.bytes_read, 1), 2),
        round(fetched_bytes(touched, WRITE) / max(least.bytes_written, 1), 2),
    )


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        "# One row per op (fp16, sm_90)",
        "",
        f"Made by `python -m benchmarks.ops` at {git_hash()}. Modelled times are of an H200 and "
        "only rank. The least bytes touch every tensor once; reads and writes are multiples of "
        "that, counted on a smaller problem under the same configuration: reads above 1 are "
        "overlapping windows and operands that several programs share, and come from the L2 cache; "
        "writes above 1 are the partial sums of split products, and what the layers of a small "
        "network hand on, which is much more than its input and output.",
        "",
        "| op | problem | least MB | reads | writes | modelled us | measured us |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        measured = "not measured" if r.measured_us is None else f"{r.measured_us:.1f}"
        problem = shorten(r.problem.replace("|", "\\|"), LONGEST_PROBLEM, placeholder=" ...")
        lines.append(
            f"| {r.op} | {problem} | {r.least_mb:.2f} | {r.reads:.2f} | {r.writes:.2f} "
            f"| {r.modelled_us:.1f} | {measured} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Counts and models every op, measures where there is a GPU, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=[*registry.BY_NAME, *VARIANTS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backend = CudaBackend() if torch.cuda.is_available() else None
    rows = []
    for name in arguments.ops:
        rows.append(row(name, backend))
        print(f"{name:<26} {rows[-1].modelled_us:>9.1f} us modelled", flush=True)
    (RESULTS / "ops.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    (RESULTS / "ops.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
