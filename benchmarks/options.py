"""What `convloom bench` and `python -m benchmarks.zoo` can be told; nothing here imports torch."""

from __future__ import annotations

import argparse

from .bounds import BOUNDS

MODELS = tuple(BOUNDS)
BATCHES = (1, 8, 32, 256)
AGAINST = ("eager", "eager-nhwc-graph", "inductor", "inductor-max")
TUNINGS = ("heuristic", "records", "search")
DTYPES = ("float16", "bfloat16", "float32")
PRECISIONS = ("ieee", "tf32")
SECONDS = 10.0


def add_options(parser: argparse.ArgumentParser, names: str = "models of the zoo") -> None:
    """Models, batches, dtype, target, peers, tuning, time and resumption. names: what a NAME may
    be."""
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help=f"{names} (default: the benchmark's ten)"
    )
    batches = " ".join(map(str, BATCHES))
    parser.add_argument(
        "--batch",
        metavar="N",
        type=int,
        nargs="+",
        default=list(BATCHES),
        help=f"images per call (default: {batches})",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"(default: {DTYPES[0]})"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0],
        help="of float32 products, everybody's (default: ieee)",
    )  # fmt: skip
    parser.add_argument(
        "--target", default="cuda", help="cuda | interpreter | reference (default: cuda)"
    )
    peers = ",".join(AGAINST)
    parser.add_argument(
        "--against",
        metavar="PEERS",
        default=peers,
        help=f'names separated by commas, or "none" (default: {peers})',
    )
    parser.add_argument(
        "--tuning", choices=TUNINGS, default="records", help="as in compile (default: records)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"for timing each model at each batch (default: {SECONDS:.0f})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the report has already"
    )


def peers_of(text: str) -> tuple[str, ...]:
    """Names separated by commas; "none" for no peer."""
    if text == "none":
        return ()
    return tuple(name.strip() for name in text.split(",") if name.strip())
