"""`convloom verify NAME|FILE`: passes, layers and results against float64, for people and for CI.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .. import zoo
from ..errors import ConvloomError, InvalidInputError
from . import evaluate, inputs, networks, output
from . import options as shared

if TYPE_CHECKING:
    import torch

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.evaluation.validate import PassCheck
    from ..compiler.run.executable import Executable, StepError
    from ..compiler.run.parity import Agreement, LayerParity, OutputParity, Truth
    from ..zoo import ZooModel

    Step: TypeAlias = StepError | LayerParity

EXIT_DIFFERS = 1
BATCH = 1


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "verify", shared.compile_options(batch=False, checked=True),
        help="compare a model or a file with float64, layer by layer",
        description="Runs a model or a saved executable on images or random numbers and prints "
        "the error of every layer and of the result against float64, beside PyTorch's own error in "
        "the same type; the worst element; and how often the likeliest classes agree. The layers "
        "of a model are compared with what its modules return, on random numbers, and what it "
        "computes before every pass with what it computes after. Exits with 0 where everything is "
        "as exact as its type allows, with 1 where something is not.",
    )
    parser.add_argument("name", metavar="NAME|FILE", nargs="?", help=shared.MODEL_OR_FILE)
    shared.add_weights(parser)
    shared.add_data(parser, required=False)
    parser.add_argument("--batch", type=shared.positive,
                        help=f"images per call (default: the model's own, or {BATCH})")


@dataclass(frozen=True)
class Subject:
    """What is verified, on batches of inputs like the examples. steps: the errors of its steps,
    from inputs, if they can be watched; entry: says how images become inputs, where they can;
    passes: what became of the network, where that was watched."""

    name: str
    target: str
    batch: int
    examples: Sequence[torch.Tensor]
    call: Executable | LoadedExecutable
    truth: Truth
    dtype: torch.dtype
    depth: int
    steps: Callable[[tuple[torch.Tensor, ...]], list[Step]] | None
    entry: ZooModel | None
    passes: tuple[PassCheck, ...] = ()


def run(options: argparse.Namespace) -> int:
    """Verifies, prints, and says by its status whether all is right."""
    if options.name is None:  # `verify --passes NAME`
        if options.passes in ("default", shared.CHECKED):
            raise InvalidInputError("verify: expected a model or a file, got none")
        options = shared.changed(options, name=options.passes, passes=shared.CHECKED)
    is_file = shared.is_file(options.name) or (
        Path(options.name).is_file() and Path(options.name).suffix not in (".onnx", ".pt2")
    )
    if options.passes == shared.CHECKED and not is_file:
        return _run_passes(shared.changed(options, passes="default"))
    subject = _file(options) if is_file else _model(options)
    random = [networks.drawn(subject.examples)]
    batches = random if options.data is None else _images(options, subject)
    steps, rows, agreement = _verify(subject, batches)
    problems = [check.problem for check in subject.passes if check.problem is not None]
    problems += _first_wrong_layer(steps)
    problems += [f"{row.name}: {row.problem}" for row in rows if row.problem is not None]
    kind = str(subject.dtype).removeprefix("torch.")
    found = {
        "name": subject.name,
        "target": subject.target,
        "dtype": kind,
        "passed": not problems,
        "outputs": [asdict(row) for row in rows],
        "agreement": asdict(agreement) if agreement else None,
        "steps": [asdict(step) for step in steps],
        "passes": [asdict(check) for check in subject.passes],
    }
    told = "\n".join(problems) if problems else "as exact as its type allows"
    output.answer(options, found, *_lines(kind, steps, rows, agreement), told)
    return EXIT_DIFFERS if problems else 0


def _run_passes(options: argparse.Namespace) -> int:
    """Compares what a model computes before and after every pass."""
    from ..compiler.evaluation.validate import Validation

    target = shared.target(options)
    network = networks.find(options.name, options, options.weights)
    validation = Validation(strict=False)
    with output.working(f"running the passes on {network.name} for {target}"):
        networks.lower_for(network, options.batch, options, validation=validation)
    checks = validation.checks
    problems = [check.problem for check in checks if check.problem is not None]
    rows = [(c.name, c.changed, f"{c.error:.1e}", "WRONG" if c.problem else "ok") for c in checks]
    headings = ("pass", "changed nodes", "largest error", "")
    table = output.table(headings, rows, "before and after, float64")
    found = {"name": network.name, "target": target, "passed": not problems,
             "passes": [asdict(check) for check in checks]}  # fmt: skip
    output.answer(options, found, table, *problems)
    return EXIT_DIFFERS if problems else 0


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

    target = shared.target(options)
    network = networks.find(options.name, options, options.weights)
    model, examples = network.model, network.tensors(options.batch)
    x = networks.drawn(examples)
    validation = Validation(parity.as_numbers(x, torch.float64), strict=False)
    with output.working(f"compiling {network.name} for {target}"):
        executable = networks.compile_for(network, options.batch, options, validation=validation)
    dtype = parity.dtype_of(executable.graph)

    placed = executable.interface.placed

    def steps(_: tuple[torch.Tensor, ...]) -> list[Step]:
        layers = parity.layers_of(model, dtype, x, placed)
        return list(parity.layer_parity(executable, validation, layers, x, dtype))

    return Subject(
        name=network.name, target=target, batch=network.batch(options.batch), examples=examples,
        call=executable, truth=parity.truth_of_module(model, dtype, placed), dtype=dtype,
        depth=parity.depth_of(executable.graph), steps=steps if executable.has_steps else None,
        entry=network.pictured("verify") if [x.dim() for x in examples] == [4] else network.entry,
        passes=tuple(validation.checks),
    )


def _file(options: argparse.Namespace) -> Subject:
    import torch

    from ..compiler.artifact.load import load
    from ..compiler.run import parity

    shared.refuse_choices(options, "batch")
    target = options.target or shared.default_target()
    with output.working(f"loading {options.name}"):
        executable = load(options.name, target)
        graph = load(options.name, "reference").executables[-1].graph
    batch = min(options.batch or BATCH, max(each.batches[1] for each in executable.programs))
    last = executable.executables[-1] if target != "cuda" else None

    def steps(x: tuple[torch.Tensor, ...]) -> list[Step]:
        assert last is not None
        arguments, keywords = executable.interface.placed(x)
        return list(last.errors(*arguments, **keywords))

    model = executable.artifact.document.model
    return Subject(
        name=options.name, target=target, batch=batch,
        examples=[torch.zeros(port.spec.at(batch), dtype=port.spec.dtype)
                  for port in executable.plan.inputs],
        call=executable, truth=parity.truth_of_graph(graph), dtype=parity.dtype_of(graph),
        depth=parity.depth_of(graph), steps=steps if last is not None and last.has_steps else None,
        entry=zoo.entry(model) if model in zoo.names() else None,
    )  # fmt: skip


def _images(options: argparse.Namespace, subject: Subject) -> Iterator[tuple[torch.Tensor, ...]]:
    """The folder's images, batch by batch; the last one is filled up with its last image."""
    import torch

    if subject.entry is None:
        raise InvalidInputError(
            f"--data: '{options.name}' does not say which model of the zoo it is, so images cannot "
            "be prepared for it; leave --data out"
        )
    classes = subject.entry.num_classes or subject.call.outputs[0].spec.shape[-1]
    folder = evaluate.read_folder(options.data, classes, options.limit)
    for start in range(0, len(folder.files), subject.batch):
        files = [file for file, _ in folder.files[start : start + subject.batch]]
        images = [inputs.read_image(file, subject.entry) for file in files]
        crops = [inputs.evaluation_crops(image, subject.entry, 1) for image in images]
        crops += crops[-1:] * (subject.batch - len(crops))
        yield (torch.cat(crops),)


def _verify(
    subject: Subject, batches: Iterable[tuple[torch.Tensor, ...]]
) -> tuple[list[Step], list[OutputParity], Agreement | None]:
    """Steps on the first batch; of every output the worst batch; answers on all of them."""
    from ..compiler.run import parity

    names = [port.name for port in subject.call.plan.outputs]
    steps: list[Step] = []
    rows: list[OutputParity] = []
    agreement = parity.Agreement()
    for at, x in enumerate(batches):
        with output.working(f"batch {at + 1}: {subject.target}, eager and float64"):
            results = _call(subject, x)
            truth = subject.truth(x)
            if at == 0 and subject.steps is not None:
                steps = subject.steps(x)
        new = parity.parity(names, results, truth, subject.dtype, subject.depth)
        rows = [max(pair, key=_badness) for pair in zip(rows, new, strict=True)] if rows else new
        if results[0].dim() == 2:
            agreement.add(results[0].double(), truth[1][0].double(), truth[0][0])
    return steps, rows, agreement if agreement.images else None


def _call(subject: Subject, x: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    from ..compiler.run.parity import tensors_of

    try:
        tensors = [each.to(subject.call.place) for each in x]
        arguments, keywords = subject.call.interface.placed(tensors)
        result = subject.call(*arguments, **keywords)
    except RuntimeError as error:
        raise ConvloomError(f"{subject.name} failed on {subject.target}: {error}") from error
    return [tensor.cpu() for tensor in tensors_of(result)]


def _badness(row: OutputParity) -> tuple[bool, float]:
    share = row.worst.error / row.worst.allowed if row.worst else 0.0
    return row.problem is not None, share


def _lines(
    kind: str, steps: list[Step], rows: list[OutputParity], agreement: Agreement | None
) -> Iterator[object]:
    lines: list[tuple[str, str, Step | OutputParity]] = [
        (getattr(step, "layer", "") or step.module_path, step.step, step) for step in steps
    ]
    lines += [("result", row.name, row) for row in rows]
    cells = [(*names, f"{row.compiled:.1e}", f"{row.eager:.1e}") for *names, row in lines]
    headings = ("layer", "step", ">compiled", ">eager")
    yield output.table(headings, cells, f"largest error / rms, {kind}")
    if not steps:
        yield "--target interpreter or emulator:sm_90 compares layers"
    for row in rows:
        if (worst := row.worst) is not None:
            yield (
                f"{row.name}: worst element {worst.index}: got {worst.got:.9g}, expected "
                f"{worst.expected:.9g}; error {worst.error:.2g} of {worst.allowed:.2g} allowed"
            )
    if agreement is not None:
        yield (
            f"likeliest class as in float64: compiled {agreement.compiled_top1} of "
            f"{agreement.images}, eager {agreement.eager_top1}; among float64's five: compiled "
            f"{agreement.compiled_top5}, eager {agreement.eager_top5}"
        )
