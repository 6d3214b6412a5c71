"""`convloom evaluate NAME --data FOLDER`: errors on a folder of images, eager and compiled."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ArtifactError, InvalidInputError
from . import files, inputs, networks, output
from . import options as shared

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.run.executable import Executable
    from ..zoo import ZooModel
    from ..zoo.accuracy import Errors

    Network: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROPS = (1, inputs.TEN_CROPS)
BATCH = 8


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "evaluate", shared.compile_options(batch=False),
        help="top-1 and top-5 error on a folder of images",
        description="Runs a model on every image of a folder that holds one sub-folder per "
        "class, in PyTorch and compiled, and prints both errors and both speeds. Classes are the "
        "sub-folders by name (by number where all names are numbers). Images are resized, cropped "
        "and normalised as torchvision does for the model's published weights.",
    )
    parser.add_argument("name", metavar="NAME", help=shared.MODEL_OR_FILE)
    shared.add_data(parser, required=True)
    shared.add_weights(parser)
    parser.add_argument("--classes", metavar="N", type=shared.positive,
                        help="build the model with N classes (default: its own number)")
    parser.add_argument(
        "--crops", type=int, nargs="+", choices=CROPS, default=[1],
        help="1: the centre; 10: corners and centre, and these mirrored; or both (default: 1)",
    )
    parser.add_argument("--batch", type=shared.positive,
                        help=f"crops per call (default: the model's own, or {BATCH})")


@dataclass(frozen=True)
class Folder:
    """Images by class. files: (path, index of its class)."""

    path: Path
    classes: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]


def read_folder(path: Path, classes: int, limit: int | None = None) -> Folder:
    """The images below `path`, one sub-folder for each of `classes` classes.

    Raises: ArtifactError when there is no such folder, when it has no sub-folders, another number
    of them, or one without images.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise ArtifactError(
            f"data '{path}': expected a folder with one sub-folder per class, got {found}"
        )
    names = [each.name for each in path.iterdir() if each.is_dir() and each.name[0] != "."]
    if not names:
        raise ArtifactError(
            f"data '{path}': expected one sub-folder of images per class, got a folder without "
            "sub-folders. Put the images of each class into a folder of their own"
        )
    numbers = all(name.isdecimal() for name in names)
    names.sort(key=lambda name: (int(name) if numbers else 0, name))
    if len(names) != classes:
        raise ArtifactError(
            f"data '{path}': expected {classes} sub-folders, one for each class of the model, got "
            f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}). Weights "
            f"for {len(names)} classes are loaded with --classes {len(names)}"
        )
    files = [(file, at) for at, name in enumerate(names) for file in _images(path / name)]
    if limit is not None and limit < len(files):
        files = [files[at * len(files) // limit] for at in range(limit)]
    return Folder(path, tuple(names), tuple(files))


def _images(path: Path) -> list[Path]:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "." and file.is_file()
    )
    if not files:
        raise ArtifactError(
            f"data '{path}': expected images ({' '.join(IMAGE_SUFFIXES)}), got none"
        )
    return files


@dataclass
class _Tally:
    network: Network
    errors: Errors
    seconds: float = 0.0
    answers: list[int] = field(default_factory=list)

    def add(self, crops: Sequence[torch.Tensor], labels: torch.Tensor, count: int) -> None:
        """Runs the network on batches of crops, `count` of them for each label and some to fill the
        last batch up, and counts."""
        import torch

        from ..zoo.accuracy import mean_prediction

        started = time.perf_counter()
        with torch.no_grad():
            scores = torch.cat([self.network(x) for x in crops])
        self.seconds += time.perf_counter() - started
        prediction = mean_prediction(scores[: count * len(labels)], count)
        self.errors.add(prediction, labels)
        self.answers += prediction.argmax(1).tolist()


def run(options: argparse.Namespace) -> int:
    target = shared.target(options)
    is_file = shared.is_file(options.name)
    subject = _of_file(options) if is_file else _of_network(options, target)
    folder, on = subject.folder, subject.call.target.name
    results = [row for count in dict.fromkeys(options.crops) for row in _evaluate(subject, count)]
    if subject.network is not None and not options.json:
        networks.warn_of_random_weights(subject.network)
    found = {
        "model": subject.entry.name,
        "weights": options.weights,
        "data": str(options.data),
        "classes": len(folder.classes),
        "images": len(folder.files),
        "target": on,
        "dtype": options.dtype or "float32",
        "results": results,
    }
    output.answer(
        options, found, _table(results, folder, on),
        f"{len(folder.files)} images of {len(folder.classes)} classes; images/s without decoding; "
        "as eager: images with the same likeliest class",
    )  # fmt: skip
    return 0


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, on batches of so many crops. entry: how images become its inputs;
    network: what was compiled, None for a file."""

    contenders: dict[str, Network]
    entry: ZooModel
    call: Executable | LoadedExecutable
    folder: Folder
    batch: int
    network: networks.Network | None = None


def _of_network(options: argparse.Namespace, target: str) -> _Subject:
    network = networks.find(options.name, options, options.weights, options.classes)
    entry, batch = network.pictured("evaluate"), network.batch(options.batch, BATCH)
    classes, folder = options.classes or entry.num_classes, None
    if classes:  # A folder that is none is refused before anything is compiled.
        folder = read_folder(options.data, classes, options.limit)
    with output.working(f"compiling {network.name} for {target}"):
        executable = networks.compile_for(network, batch, options)
    classes = _classes(executable, network.name)
    folder = folder or read_folder(options.data, classes, options.limit)
    contenders: dict[str, Network] = {
        "eager": _eager(network.model, executable), "compiled": partial(networks.run, executable)
    }  # fmt: skip
    return _Subject(contenders, entry, executable, folder, batch, network)


def _of_file(options: argparse.Namespace) -> _Subject:
    """The network of a saved executable by itself: it holds no module to compare with."""
    shared.refuse_choices(options, "batch")
    if options.classes is not None:
        raise InvalidInputError(f"--classes: expected a model of the zoo, got '{options.name}'")
    executable, x, _ = files.loaded(options, options.batch)
    entry = files.pictured(executable.artifact)
    folder = read_folder(options.data, _classes(executable, options.name), options.limit)
    contenders: dict[str, Network] = {"compiled": partial(networks.run, executable)}
    return _Subject(contenders, entry, executable, folder, len(x[0]))


def _classes(executable: Executable | LoadedExecutable, name: str) -> int:
    shape = executable.outputs[0].spec.shape
    if len(shape) != 2:
        raise InvalidInputError(
            f"{name}: evaluate compares classes: expected a model that answers with one score "
            f"per class, got an output of shape {shape}"
        )
    return shape[1]


def _eager(model: torch.nn.Module, executable: Executable) -> Network:
    """PyTorch's own answers in the model's dtype, on the device of the executable."""
    model = model.to(executable.place)

    def answers(x: torch.Tensor) -> torch.Tensor:
        arguments, keywords = executable.interface.placed([x.to(executable.place)])
        scores: torch.Tensor = model(*arguments, **keywords)
        return scores.cpu()

    return answers


def _evaluate(subject: _Subject, count: int) -> list[dict[str, Any]]:
    """One row per network: its errors with `count` crops of each image, and images per second.

    Networks take whole batches of crops, the same ones in turn; decoding is not timed.

    Raises: ArtifactError naming a file that is not an image.
    """
    import torch

    from ..zoo.accuracy import Errors

    folder, entry, batch = subject.folder, subject.entry, subject.batch
    dtype = subject.call.inputs[0].spec.dtype
    tallies = {name: _Tally(network, Errors()) for name, network in subject.contenders.items()}
    title = f"{count} crop{'s' if count > 1 else ''}"
    with output.working(title) as work:
        for start in range(0, len(folder.files), batch):
            work.what = f"{title}, {start:,} of {len(folder.files):,} images"
            files = folder.files[start : start + batch]
            images = [inputs.read_image(path, entry) for path, _ in files]
            crops = [inputs.evaluation_crops(each, entry, count) for each in images]
            # What is compiled or was exported takes whole batches.
            fill = crops[-1][-1:].expand(-sum(map(len, crops)) % batch, -1, -1, -1)
            pieces = torch.split(torch.cat([*crops, fill]).to(dtype), batch)
            labels = torch.tensor([label for _, label in files])
            for tally in tallies.values():
                tally.add(pieces, labels, count)
    eager = tallies.get("eager")
    return [
        {
            "crops": count,
            "network": name,
            "top1_error": tally.errors.top1,
            "top5_error": tally.errors.top5,
            "images_per_s": len(folder.files) / tally.seconds,
            "same_answers": eager and sum(map(int.__eq__, tally.answers, eager.answers)),
        }
        for name, tally in tallies.items()
    ]


def _table(results: Sequence[dict[str, Any]], folder: Folder, target: str) -> Table:
    rows = [
        (
            row["crops"],
            row["network"] if row["network"] == "eager" else f"on {target}",
            f"{row['top1_error']:.2%}",
            "-" if row["top5_error"] is None else f"{row['top5_error']:.2%}",
            f"{row['images_per_s']:,.1f}",
            "-" if row["same_answers"] is None else f"{row['same_answers']} of {len(folder.files)}",
        )
        for row in results
    ]
    headings = ("crops", "network", ">top-1 error", ">top-5 error", ">images/s", ">as eager")
    return output.table(headings, rows)
