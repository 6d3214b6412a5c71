"""Options that several sub-commands share, as parent parsers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("ieee", "tf32")
FALLBACKS = ("error", "torch")
CHECKED = "checked"
"""`--passes` without a value."""


def json_option() -> argparse.ArgumentParser:
    """`--json`."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    return parent


def compile_options(
    batch: bool = True, several: bool = False, slide: bool = False, checked: bool = False
) -> argparse.ArgumentParser:
    """What decides how a model is compiled; `batch=False` where the input decides the batch.

    several: more than one target and more than one batch or range of batches may be given.
    slide: whether the model may be made to slide over larger images. checked: whether `--passes`
    may stand alone, as `CHECKED`.
    """
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("compilation")
    group.add_argument(
        "--target",
        nargs="+" if several else None,
        help="cuda | cuda:sm_80, sm_86, sm_89, sm_90, sm_100 | interpreter | reference | "
        "emulator:sm_80, sm_86, sm_89, sm_90 "
        "(default: cuda where there is a GPU, else interpreter)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="compute in this type (default: float32)")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="ieee",
        help="float32 matrix products: fp32-accurate, or TF32 (default: ieee)",
    )
    group.add_argument(
        "--passes",
        nargs="?" if checked else None,
        const=CHECKED if checked else None,
        default="default",
        help='"default", "none", or names separated by commas (default: all)'
        + ("; alone: compare what the graph computes after each pass, and nothing else"
           if checked else ""),
    )
    group.add_argument(
        "--fallback",
        choices=FALLBACKS,
        default="error",
        help="ops without a kernel: refuse the model, or run them as torch ops (default: error)",
    )
    for name, what in (
        ("force", "make although the cost model would not"),
        ("forbid", "do not make"),
    ):
        group.add_argument(
            f"--{name}",
            metavar="FUSION",
            nargs="+",
            default=[],
            help=f'fusions to {what}: "conv-pool", "layer1.*", "conv-pool@layer1.*"',
        )
    if slide:
        group.add_argument(
            "--slide",
            type=_height_and_width,
            metavar="HxW",
            help="take images of this size, larger than the model's own, and give a map of results",
        )
    if several:
        group.add_argument(
            "--batch",
            type=_batches,
            nargs="+",
            default=[1],
            help="images per call, or a range of them such as 1-32 or 0-32 (default: 1)",
        )
    elif batch:
        group.add_argument("--batch", type=positive, default=1, help="images per call (default: 1)")
    return parent


def positive(text: str) -> int:
    """A positive integer, as an argument's type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _height_and_width(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, such as 320x480, got {text!r}")
    return positive(height), positive(width)


def _batches(text: str) -> int | tuple[int, int]:
    low, dash, high = text.partition("-")
    if not dash:
        return positive(text)
    bounds = 0 if low == "0" else positive(low), positive(high)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"expected LOWEST-HIGHEST, got {text!r}")
    return bounds


def passes(options: argparse.Namespace) -> str | tuple[str, ...]:
    """`--passes` as `convloom.compile` takes it."""
    text: str = options.passes
    if text in ("default", "none"):
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


def dtype(options: argparse.Namespace) -> torch.dtype | None:
    """`--dtype` as `convloom.compile` takes it."""
    import torch

    found: torch.dtype | None = getattr(torch, options.dtype) if options.dtype else None
    return found


def target(options: argparse.Namespace) -> str:
    """`--target`, checked, or what this machine can run.

    Raises: TargetUnavailableError for an unknown target, or for one this machine lacks.
    """
    from ..kernels.contract import targets

    if options.target is None:
        return default_target()
    name: str = options.target
    targets.parse(name)
    return name


def default_target() -> str:
    """What models run on here: "cuda" where there is a supported GPU, else "interpreter"."""
    from ..kernels.contract import targets

    capability = targets.local_capability()
    runnable = capability is not None and capability >= targets.GPU_TARGETS[0].capability
    return "cuda" if runnable else targets.INTERPRETER.name
