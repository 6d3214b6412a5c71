"""Sub-commands and the options that several of them share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("ieee", "tf32")
FALLBACKS = ("error", "torch")
OPTION = {"shapes": "input"}
"""Options that are kept under another name."""
INTERPRETER = "interpreter"
PLANNED = "cuda:sm_90"
"""What plans are made for where there is no GPU: they need none."""
CHECKED = "checked"
"""`--passes` without a value."""
MODEL = (
    "a model of the zoo (see `convloom zoo`), torchvision/NAME, timm/NAME, "
    "package.module:callable, FILE.py:callable, FILE.pt2 or FILE.onnx"
)
SUFFIX = ".loom"
MODEL_OR_FILE = f"{MODEL}; or a file that compile -o wrote (*{SUFFIX})"
INPUT_DTYPES = (*DTYPES, "uint8", "bool")


class _Help(argparse.HelpFormatter):
    """Keeps names such as conv-pool on one line."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def command(
    commands: SubParsers,
    run: Callable[[argparse.Namespace], int],
    name: str,
    *compilation: argparse.ArgumentParser,
    help: str,
    description: str,
) -> argparse.ArgumentParser:
    """A sub-command that `run` executes, with `--json` and the options of parent parsers."""
    parser = commands.add_parser(
        name, help=help, description=description, parents=list(compilation), formatter_class=_Help
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(run=run)
    return parser


def compile_options(
    batch: bool = True, several: bool = False, slide: bool = False, checked: bool = False,
    elsewhere: str = INTERPRETER,
) -> argparse.ArgumentParser:  # fmt: skip
    """What decides how a model is compiled; `batch=False` where the input decides the batch.

    several: more than one target and more than one batch or range of batches may be given.
    slide: whether the model may be made to slide over larger images. checked: whether `--passes`
    may stand alone, as `CHECKED`. elsewhere: the target where there is no GPU.
    """
    parent = argparse.ArgumentParser(add_help=False)
    add = parent.add_argument_group("compilation").add_argument
    add("--target", nargs="+" if several else None,
        help="cuda | cuda:sm_80, sm_86, sm_89, sm_90, sm_100 | interpreter | reference | "
        "emulator:sm_80, sm_86, sm_89, sm_90 (default: cuda where there is a GPU, else "
        f"{elsewhere})")
    add_input(parent)
    add("--dtype", choices=DTYPES, help="compute in this type (default: float32)")
    add("--precision", choices=PRECISIONS, default="ieee",
        help="float32 matrix products: fp32-accurate, or TF32 (default: ieee)")
    alone = "; alone: compare what the graph computes after each pass, and nothing else"
    add("--passes", nargs="?" if checked else None, const=CHECKED if checked else None,
        default="default", help='"default" (all), "none", or names separated by commas'
        f"{alone if checked else ''}")
    add("--fallback", choices=FALLBACKS, default="error",
        help="ops without a kernel: refuse the model, or run them as torch ops "
        "(default: error)")
    verbs = {"force": "to make even where they seem slower", "forbid": "not to make"}
    for name, verb in verbs.items():
        add(f"--{name}", metavar="FUSION", nargs="+", default=[],
            help=f'fusions {verb}: "conv-pool", "layer1.*", "conv-pool@layer1.*"')
    if slide:
        add("--slide", type=_height_and_width, metavar="HxW", help="take images of this size, "
            "larger than the model's own, and give a map of results")
    if several:
        add("--batch", type=_batches, nargs="+", default=[None],
            help="images per call, or a range of them such as 1-32 or 0-32 "
            "(default: the model's own, or 1)")
    elif batch:
        add("--batch", type=positive, help="images per call (default: the model's own, or 1)")
    return parent


def add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", dest="shapes", metavar="SHAPE", nargs="+", type=_shape,
                        help="what each input is, for a model that does not say or takes others "
                        "too: 1x3x224x224, or 1x3x224x224:float16")


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="FILE", help="a .safetensors or .pth file, or "
                        '"digits" for lenet5 (default: random, seed 0)')


def add_data(parser: argparse.ArgumentParser, required: bool) -> None:
    usual = "" if required else " (default: one random batch)"
    parser.add_argument("--data", metavar="FOLDER", type=Path, required=required,
                        help=f"one sub-folder of images per class{usual}")
    parser.add_argument("--limit", metavar="N", type=positive,
                        help="at most N images, evenly from the whole folder")


def positive(text: str) -> int:
    """A positive integer, as an argument's type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[tuple[int, ...], str]:
    sizes, _, dtype = text.partition(":")
    dtype = dtype if ":" in text else INPUT_DTYPES[0]
    parts = sizes.lower().split("x")
    if not all(part.isdecimal() and int(part) for part in parts) or dtype not in INPUT_DTYPES:
        raise argparse.ArgumentTypeError(
            f"expected sizes with x between them, such as 1x3x224x224, and optionally a dtype "
            f"({', '.join(INPUT_DTYPES)}), such as 1x3x224x224:float16, got {text!r}"
        )
    return tuple(map(int, parts)), dtype


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


def changed(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changes})


def is_file(name: str) -> bool:
    """Whether a NAME is a saved executable rather than a model of the zoo."""
    return Path(name).suffix == SUFFIX


def refuse_choices(options: argparse.Namespace, *welcome: str) -> None:
    """Raises InvalidInputError for options that come too late, as the file NAME is compiled
    already; those that are `welcome` do not."""
    usual = {**vars(compile_options(slide=True).parse_args([])), "weights": None}
    for name in usual.keys() - {"target", *welcome}:
        if getattr(options, name, usual[name]) != usual[name]:
            raise InvalidInputError(
                f"--{OPTION.get(name, name)}: expected a model, got the file '{options.name}', "
                "which is compiled already"
            )


def passes(options: argparse.Namespace) -> str | tuple[str, ...]:
    """`--passes` as `convloom.compile` takes it."""
    text: str = options.passes
    if text in ("default", "none"):
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


def dtype(options: argparse.Namespace) -> torch.dtype | None:
    """`--dtype` as `convloom.compile` takes it."""
    import torch

    return getattr(torch, options.dtype) if options.dtype else None


def target(options: argparse.Namespace) -> str:
    """`--target`, checked, or what this machine can run.

    Raises: TargetUnavailableError for an unknown target, or for one this machine lacks.
    """
    from ..kernels.contract import targets

    name: str = options.target or default_target()
    targets.parse(name)
    return name


def default_target() -> str:
    """What models run on here: "cuda" where there is a supported GPU, else "interpreter"."""
    from ..kernels.contract import targets

    capability = targets.local_capability()
    runnable = capability is not None and capability >= targets.GPU_TARGETS[0].capability
    return "cuda" if runnable else INTERPRETER
