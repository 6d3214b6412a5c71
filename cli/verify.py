"""`convloom verify NAME|FILE`: passes, layers and results against float64, for people and for CI.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import zoo
from ..errors import ConvloomError, InvalidInputError
from . import evaluate, inputs, models, output
from . import options as shared

if TYPE_CHECKING:
    import torch

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.evaluation.validate import PassCheck
    from ..compiler.run.executable import Executable, StepError
    from ..compiler.run.parity import Agreement, LayerParity, OutputParity, Truth
    from ..zoo import ZooModel
    from .options import SubParsers

    Step: TypeAlias = StepError | LayerParity

SUFFIX = ".loom"
EXIT_DIFFERS = 1
BATCH = 1


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "verify",
        help="compare a model or a file with float64, layer by layer",
        description="Runs a zoo model or a saved executable on images or random numbers and prints "
        "the error of every layer and of the result against float64, beside PyTorch's own error in "
        "the same type; the worst element; and how often the likeliest classes agree. The layers "
        "of a zoo model are compared with what its modules return, on random numbers, and what it "
        "computes before every pass with what it computes after. Exits with 0 where everything is "
        "as exact as its type allows, with 1 where something is not.",
        parents=[shared.compile_options(batch=False, checked=True), shared.json_option()],
    )
    parser.add_argument("name", metavar="NAME|FILE", nargs="?",
                        help=f"{models.NAME_HELP}, or a {SUFFIX} file")  # fmt: skip
    parser.add_argument("--weights", metavar="FILE",
                        help='a .safetensors or .pth file, or "digits" for lenet5 '
                        "(default: random, seed 0)")  # fmt: skip
    parser.add_argument(
        "--data", metavar="FOLDER", type=Path,
        help="one sub-folder of images per class (default: one random batch)",
    )  # fmt: skip
    parser.add_argument("--limit", metavar="N", type=shared.positive,
                        help="at most so many images, evenly from the whole folder")  # fmt: skip
    parser.add_argument("--batch", type=shared.positive, default=BATCH,
                        help=f"images per call (default: {BATCH})")  # fmt: skip
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Subject:
    """What is verified. steps: the errors of its steps, from inputs, if they can be watched;
    entry: the zoo model that says how images become inputs, if it is one; passes: what became of
    the network, where that was watched."""

    name: str
    target: str
    call: Executable | LoadedExecutable
    truth: Truth
    dtype: torch.dtype
    depth: int
    outputs: tuple[str, ...]
    steps: Callable[[tuple[torch.Tensor, ...]], list[Step]] | None
    entry: ZooModel | None
    passes: tuple[PassCheck, ...] = ()


def run(options: argparse.Namespace) -> int:
    """Verifies, prints, and says by its status whether all is right."""
    if options.name is None:  # `verify --passes NAME`
        if options.passes in ("default", shared.CHECKED):
            raise InvalidInputError("verify: expected a model of the zoo or a file, got none")
        options.name, options.passes = options.passes, shared.CHECKED
    is_file = Path(options.name).suffix == SUFFIX or Path(options.name).is_file()
    if options.passes == shared.CHECKED and not is_file:
        return _run_passes(options)
    subject = _file(options) if is_file else _model(options)
    batches = _random(options) if options.data is None else _images(options, subject)
    steps, rows, agreement = _verify(subject, batches)
    problems = [check.problem for check in subject.passes if check.problem is not None]
    problems += _first_wrong_layer(steps)
    problems += [f"{row.name}: {row.problem}" for row in rows if row.problem is not None]
    if options.json:
        output.print_json(_document(subject, steps, rows, agreement, not problems))
    else:
        _print(subject, steps, rows, agreement, problems)
    return EXIT_DIFFERS if problems else 0


def _run_passes(options: argparse.Namespace) -> int:
    """Compares what a zoo model computes before and after every pass."""
    import torch
    from rich.table import Table

    from ..compiler.evaluation.validate import Validation

    entry, target = zoo.entry(options.name), shared.target(options)
    options.passes = "default"
    model, validation = models.build(entry.name, options.weights), Validation(strict=False)
    example = torch.zeros(options.batch, *entry.input_shape)
    with output.working(f"running the passes on {entry.name} for {target}"):
        models.lower_for(model, example, target=target, options=options, validation=validation)
    checks = validation.checks
    passed = all(check.problem is None for check in checks)
    if options.json:
        output.print_json({"name": entry.name, "target": target, "passed": passed,
                           "passes": [asdict(check) for check in checks]})  # fmt: skip
        return 0 if passed else EXIT_DIFFERS
    table = Table("pass", "changed nodes", "largest error", "", title="before and after, float64")
    for check in checks:
        verdict = "ok" if check.problem is None else "WRONG"
        table.add_row(check.name, str(check.changed), f"{check.error:.1e}", verdict)
    console = output.console()
    console.print(table)
    for check in checks:
        if check.problem is not None:
            console.print(check.problem, markup=False)
    return 0 if passed else EXIT_DIFFERS


def _first_wrong_layer(steps: list[Step]) -> list[str]:
    """Where the first layer that is not what its module returns is worst, in words."""
    from ..compiler.run.parity import LayerParity

    for step in steps:
        if isinstance(step, LayerParity) and step.problem is not None:
            layer = f"'{step.layer}'" if step.layer else f"what '{step.module_path}' ends with"
            border = "on the border of the image" if step.border else "not on a border"
            return [f"first wrong layer: {layer}, step {step.step}: {step.problem}; {border}"]
    return []


def _model(options: argparse.Namespace) -> Subject:
    import torch

    from ..compiler.evaluation.validate import Validation
    from ..compiler.run import parity

    entry, target = zoo.entry(options.name), shared.target(options)
    model = models.build(entry.name, options.weights)
    options.shapes = [(options.batch, *entry.input_shape)]
    (x,) = _random(options)
    validation = Validation([each.double() for each in x], strict=False)
    with output.working(f"compiling {entry.name} for {target}"):
        executable = models.compile_for(
            model, torch.zeros_like(x[0]), target=target, options=options, validation=validation
        )
    dtype = parity.dtype_of(executable.graph)

    def steps(_: tuple[torch.Tensor, ...]) -> list[Step]:
        layers = parity.layers_of(model, dtype, x)
        return list(parity.layer_parity(executable, validation, layers, x, dtype))

    names = tuple(port.name for port in executable.plan.outputs)
    truth, depth = parity.truth_of_module(model, dtype), parity.depth_of(executable.graph)
    return Subject(entry.name, target, executable, truth, dtype, depth, names,
                   steps if executable.has_steps else None, entry,
                   tuple(validation.checks))  # fmt: skip


def _file(options: argparse.Namespace) -> Subject:
    from ..compiler.artifact.load import load
    from ..compiler.run import parity

    chosen: dict[str, Any] = {
        "dtype": None, "precision": "ieee", "passes": "default", "fallback": "error",
        "force": [], "forbid": [], "weights": None,
    }  # fmt: skip
    for name, default in chosen.items():
        if getattr(options, name) != default:
            raise InvalidInputError(
                f"--{name}: '{options.name}' is compiled already; expected a model of the zoo"
            )
    target = shared.default_target() if options.target is None else options.target
    with output.working(f"loading {options.name}"):
        executable = load(options.name, target)
        graph = load(options.name, "reference").executables[-1].graph
    batches = [program.batches for program in executable.programs]
    held = max(high for _, high in batches)
    options.batch = min(options.batch, held)
    options.shapes = [port.spec.at(options.batch) if port.spec.batch else port.spec.shape
                      for port in executable.plan.inputs]  # fmt: skip
    last = executable.executables[-1] if target != "cuda" else None
    watched = last if last is not None and last.has_steps else None

    def steps(x: tuple[torch.Tensor, ...]) -> list[Step]:
        return list(watched.errors(*x)) if watched is not None else []

    names = tuple(port.name for port in executable.plan.outputs)
    model = executable.artifact.document.model
    entry = zoo.entry(model) if model in zoo.names() else None
    truth, dtype = parity.truth_of_graph(graph), parity.dtype_of(graph)
    return Subject(options.name, target, executable, truth, dtype,
                   parity.depth_of(graph), names, steps if watched else None, entry)  # fmt: skip


def _random(options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, ...]]:
    """One batch of normally distributed numbers, always the same."""
    import torch

    generator = torch.Generator().manual_seed(models.SEED)
    yield tuple(torch.randn(shape, generator=generator) for shape in options.shapes)


def _images(options: argparse.Namespace, subject: Subject) -> Iterator[tuple[torch.Tensor, ...]]:
    """The folder's images, batch by batch; the last one is filled up with its last image."""
    import torch

    if subject.entry is None:
        raise InvalidInputError(
            f"--data: '{options.name}' does not say which model of the zoo it is, so images cannot "
            "be prepared for it; leave --data out"
        )
    folder = evaluate.read_folder(options.data, subject.entry.num_classes, options.limit)
    for start in range(0, len(folder.files), options.batch):
        files = [file for file, _ in folder.files[start : start + options.batch]]
        crops = [inputs.evaluation_crops(inputs.read_image(f), subject.entry, 1) for f in files]
        crops += crops[-1:] * (options.batch - len(crops))
        yield (torch.cat(crops),)


def _verify(
    subject: Subject, batches: Iterator[tuple[torch.Tensor, ...]]
) -> tuple[list[Step], list[OutputParity], Agreement | None]:
    """Steps on the first batch; of every output the worst batch; answers on all of them."""
    from ..compiler.run import parity

    steps: list[Step] = []
    rows: list[OutputParity] = []
    agreement = parity.Agreement()
    for at, x in enumerate(batches):
        with output.working(f"batch {at + 1}: {subject.target}, eager and float64"):
            results = _call(subject, x)
            truth = subject.truth(x)
            if at == 0 and subject.steps is not None:
                steps = subject.steps(x)
        new = parity.parity(subject.outputs, results, truth, subject.dtype, subject.depth)
        rows = [max(pair, key=_badness) for pair in zip(rows, new, strict=True)] if rows else new
        if results[0].dim() == 2:
            agreement.add(results[0].double(), truth[1][0].double(), truth[0][0])
    return steps, rows, agreement if agreement.images else None


def _call(subject: Subject, x: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    from ..compiler.run.parity import tensors_of

    try:
        result = subject.call(*(each.to(subject.call.place) for each in x))
    except RuntimeError as error:
        raise ConvloomError(f"{subject.name} failed on {subject.target}: {error}") from error
    return [tensor.cpu() for tensor in tensors_of(result)]


def _badness(row: OutputParity) -> tuple[bool, float]:
    share = row.worst.error / row.worst.allowed if row.worst else 0.0
    return row.problem is not None, share


def _document(
    subject: Subject,
    steps: list[Step],
    rows: list[OutputParity],
    agreement: Agreement | None,
    passed: bool,
) -> dict[str, Any]:
    return {
        "name": subject.name,
        "target": subject.target,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "passed": passed,
        "outputs": [asdict(row) for row in rows],
        "agreement": asdict(agreement) if agreement else None,
        "steps": [asdict(step) for step in steps],
        "passes": [asdict(check) for check in subject.passes],
    }


def _print(
    subject: Subject,
    steps: list[Step],
    rows: list[OutputParity],
    agreement: Agreement | None,
    problems: list[str],
) -> None:
    from rich.table import Table

    console = output.console()
    kind = str(subject.dtype).removeprefix("torch.")
    table = Table("layer", "step", "compiled", "eager", title=f"largest error / rms, {kind}")
    for column in table.columns[2:]:
        column.justify = "right"
    for step in steps:
        layer = getattr(step, "layer", "") or step.module_path
        table.add_row(layer, step.step, f"{step.compiled:.1e}", f"{step.eager:.1e}")
    for row in rows:
        table.add_row("result", row.name, f"{row.compiled:.1e}", f"{row.eager:.1e}")
    console.print(table)
    if not steps:
        console.print("--target interpreter or emulator:sm_90 compares layers", markup=False)
    for row in rows:
        if row.worst is not None:
            console.print(
                f"{row.name}: worst element {row.worst.index}: got {row.worst.got:.9g}, expected "
                f"{row.worst.expected:.9g}; error {row.worst.error:.2g} of {row.worst.allowed:.2g} "
                "allowed",
                markup=False,
            )
    if agreement is not None:
        count = agreement.images
        console.print(
            f"likeliest class as in float64: compiled {agreement.compiled_top1} of {count}, eager "
            f"{agreement.eager_top1}; among float64's five: compiled {agreement.compiled_top5}, "
            f"eager {agreement.eager_top5}",
            markup=False,
        )
    console.print("\n".join(problems) if problems else "as exact as its type allows", markup=False)
