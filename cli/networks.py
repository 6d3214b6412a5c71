"""What a NAME on the command line stands for: a model of the zoo, of torchvision or timm, anything
that Python can import, or a file; compiled as the options ask."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import zoo
from ..errors import ArtifactError, InvalidInputError, near_names
from . import inputs, output
from . import options as shared

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.explain.report import Report
    from ..compiler.graph.ir import Graph
    from ..compiler.plan.plan import Plan
    from ..compiler.run.executable import Executable
    from ..zoo import ZooModel

SEED = 0


@dataclass(frozen=True)
class Network:
    """A model with an example of its inputs, ready for inference.

    entry: the model of the zoo, if it is one. is_random: whether its weights are made up here.
    says_batch: whether the batch of the example is meant.
    """

    name: str
    model: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    entry: ZooModel | None = None
    is_random: bool = False
    says_batch: bool = False

    def batch(self, asked: int | None = None, usual: int = 1) -> int:
        """The number of images that is meant: what was asked for, the example's, or the usual."""
        sizes = self.tensors()[0].shape
        return asked or (sizes[0] if self.says_batch and sizes else usual)

    def tensors(self, batch: int | None = None) -> list[torch.Tensor]:
        import torch
        from torch.utils import _pytree as pytree

        return list(filter(torch.is_tensor, pytree.tree_leaves(self.example(batch))))

    def example(self, batch: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords with zeros for `batch` images in every tensor whose first size is
        that of the first tensor."""
        import torch
        from torch.utils import _pytree as pytree

        both = (self.arguments, self.keywords)
        first = next((x.shape[:1] for x in filter(torch.is_tensor, pytree.tree_leaves(both))), ())

        def sized(x: torch.Tensor) -> torch.Tensor:
            changes = batch is not None and bool(first) and x.shape[:1] == first
            shape = (batch, *x.shape[1:]) if changes else x.shape
            return torch.zeros(shape, dtype=x.dtype)

        result: tuple[tuple[Any, ...], dict[str, Any]]
        result = pytree.tree_map_only(torch.Tensor, sized, both)
        return result

    def pictured(self, command: str) -> ZooModel:
        """What images have to become for it.

        Raises: InvalidInputError where its only tensor is not an image.
        """
        if self.entry is not None:
            return self.entry
        return inputs.entry_of(f"{command} {self.name}", self.name, self.tensors())


def find(
    name: str,
    options: argparse.Namespace,
    weights: str | None = None,
    classes: int | None = None,
    build: Callable[..., nn.Module] | None = None,
) -> Network:
    """The network that NAME stands for, with inputs as `--input` says or as the model does.

    weights, classes: of `--weights`, `--classes`. build: makes a model of the zoo otherwise than
    with seeded weights.

    Raises: InvalidInputError for what is nothing of the kind, or whose inputs are not known;
    ArtifactError for files that are absent, damaged or do not fit.
    """
    _refuse_options(name, weights, classes)
    if Path(name).suffix in (".onnx", ".pt2"):
        network = _from_file(name, options)
    elif ":" in name:
        from ..zoo.checkpoint import load_weights

        network = Network(name, load_weights(_called(name), weights).eval(), ())
    elif name.partition("/")[0] in ("torchvision", "timm"):
        network = _from_library(name, weights)
    else:
        network = _from_zoo(name, weights, classes, build or zoo_model)
    return _sized(network, getattr(options, "shapes", None))


def zoo_model(name: str, weights: str | None = None, classes: int | None = None) -> nn.Module:
    """The zoo model, ready for inference; without a weight file its weights are seeded.

    classes: how many classes it tells apart (None: as many as the model of the zoo).

    Raises: InvalidInputError for an unknown name, ArtifactError for unusable weights.
    """
    with seeded():
        options = {} if classes is None else {"num_classes": classes}
        return zoo.build(name, weights=weights, **options).eval()


@contextmanager
def seeded() -> Iterator[None]:
    """Inside the block random weights are always the same."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _refuse_options(name: str, weights: str | None, classes: int | None) -> None:
    suffix = Path(name).suffix
    if weights is not None and suffix in (".onnx", ".pt2"):
        raise InvalidInputError(f"--weights: expected none with '{name}', which holds its own")
    if classes is not None and name not in zoo.names():
        raise InvalidInputError(
            f"--classes: expected a model of the zoo, got {name}, which has the classes it was "
            "made with"
        )
    if suffix == shared.SUFFIX:
        raise InvalidInputError(f"'{name}' is compiled already; expected {shared.MODEL}")


def _from_zoo(
    name: str, weights: str | None, classes: int | None, build: Callable[..., nn.Module]
) -> Network:
    import torch

    if name not in zoo.names() and ("/" in name or "." in name):
        raise InvalidInputError(f"unknown model '{name}': expected {shared.MODEL}")
    entry = zoo.entry(name)
    model = build(name, weights, classes)
    example = (torch.zeros(1, *entry.input_shape),)
    return Network(name, model, example, entry=entry, is_random=weights is None)


def _from_file(name: str, options: argparse.Namespace) -> Network:
    from ..compiler.capture.example_inputs import opened

    if not Path(name).is_file():
        found = "a folder" if Path(name).is_dir() else "no such file"
        raise ArtifactError(f"model '{name}': expected a file, got {found}")
    given = getattr(options, "shapes", None)
    try:
        model, arguments, keywords = opened(name, tuple(made(given)), None)
    except InvalidInputError as error:
        raise InvalidInputError(f"{error} (--input 1x3x224x224)") from error
    return Network(name, model, tuple(arguments), dict(keywords or {}), says_batch=True)


def _from_library(name: str, weights: str | None) -> Network:
    import torch

    from ..benchmarks import foreign
    from ..zoo.checkpoint import load_weights

    try:
        model, shape = foreign.named(name)
    except ImportError as error:
        library = name.partition("/")[0]
        lacking = (error.name or library).partition(".")[0]  # timm takes torchvision.
        raise InvalidInputError(
            f"{name}: {library} cannot be imported ({error}); pip install {lacking}"
        ) from error
    example = () if shape is None else (torch.zeros(1, *shape),)
    return Network(name, load_weights(model, weights), example, is_random=weights is None)


def made(shapes: list[tuple[tuple[int, ...], str]] | None) -> Iterator[torch.Tensor]:
    """Tensors of zeros as `--input` says."""
    import torch

    for shape, dtype in shapes or ():
        yield torch.zeros(shape, dtype=getattr(torch, dtype))


def drawn(examples: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Tensors like the examples, always the same: normally distributed floats, bytes, masks."""
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def one(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator).to(x)
        highest = 1 if x.dtype is torch.bool else 255
        return torch.randint(highest + 1, x.shape, generator=generator).to(x)

    return tuple(map(one, examples))


def _sized(network: Network, shapes: list[tuple[tuple[int, ...], str]] | None) -> Network:
    """The network with the inputs that `--input` says."""
    if not shapes:
        if not network.arguments and not network.keywords:
            raise InvalidInputError(
                f"{network.name} does not say what its inputs are; pass --input, such as "
                "--input 1x3x224x224"
            )
        return network
    given = tuple(made(shapes))
    entry = network.entry
    if entry is not None:
        if len(given) != 1 or given[0].dim() != 4:
            raise InvalidInputError(
                f"--input: expected the shape of one image for {network.name}, such as "
                f"1x{'x'.join(map(str, entry.input_shape))}"
            )
        _, channels, height, width = given[0].shape
        entry = replace(entry, input_shape=(channels, height, width))
    return replace(network, arguments=given, keywords={}, entry=entry, says_batch=True)


# Compiling.


def warn_of_random_weights(network: Network) -> None:
    """Says on stderr that the answers of a model with random weights mean nothing."""
    if network.is_random:
        hint = "--weights digits" if network.name in inputs.DIGIT_MODELS else "--weights FILE"
        text = f"the weights are random (seed {SEED}), so the classes mean nothing; pass {hint}"
        output.say(text, stderr=True)


def compile_model(
    network: Network, options: argparse.Namespace, batch: int | tuple[int, int] | None
) -> Executable:
    """The network compiled for `batch` images (None: for its example's), or for any number in a
    range.

    Raises: ConvloomError for an unknown target or pass, and as compiling does.
    """
    bounds = batch if isinstance(batch, tuple) else None
    most = batch[1] if isinstance(batch, tuple) else batch
    return compile_for(network, most, options, dynamic_batch=bounds)


def compile_for(
    network: Network, batch: int | None, options: argparse.Namespace, **more: Any
) -> Executable:
    """The network compiled for `batch` images; more: as `api.executable_for` takes it."""
    from ..compiler.api import executable_for

    example, keywords = network.example(batch)
    choices = {"kwargs": keywords, **_choices(options), **more}
    # Under CONVLOOM_DEBUG the compiler prints: never into the JSON that a command answers with.
    with redirect_stdout(sys.stderr):
        return executable_for(network.model, example, **choices)


def lower_for(
    network: Network, batch: int | None, options: argparse.Namespace, **more: Any
) -> tuple[Graph, Plan, Report]:
    """The network as it would be compiled for `batch` images, without code; more: as
    `api.lowered` takes it."""
    from ..compiler.api import lowered

    example, keywords = network.example(batch)
    choices = {"kwargs": keywords, **_choices(options), **more}
    with redirect_stdout(sys.stderr):
        return lowered(network.model, example, **choices)


def placed(
    executable: Executable | LoadedExecutable, batch: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Zeros as inputs of an executable, where it takes them: larger images under `--slide`."""
    import torch

    specs, place = [port.spec for port in executable.inputs], executable.place
    return executable.interface.placed([
        torch.zeros(spec.at(batch) if batch else spec.shape, dtype=spec.dtype, device=place)
        for spec in specs
    ])  # fmt: skip


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of a compilation."""
    return {
        "target": shared.target(options),
        "dtype": shared.dtype(options),
        "precision": options.precision,
        "passes": shared.passes(options),
        "fallback": options.fallback,
        "force": options.force,
        "forbid": options.forbid,
        "slide": getattr(options, "slide", None),
    }


def seen(entry: ZooModel, options: argparse.Namespace) -> ZooModel:
    """The model with the images that it takes: larger ones than its own under `--slide`."""
    size = getattr(options, "slide", None)
    return entry if size is None else replace(entry, input_shape=(entry.input_shape[0], *size))


def run(executable: Executable | LoadedExecutable, x: torch.Tensor) -> torch.Tensor:
    """The executable's only output, on the CPU; moves the input to the GPU where it must be."""
    import torch

    arguments, keywords = executable.interface.placed([x.to(executable.place)])
    y = executable(*arguments, **keywords)
    if not isinstance(y, torch.Tensor):
        raise InvalidInputError(
            f"expected a model that returns one tensor, this one returns a {type(y).__name__}; "
            "call it in Python"
        )
    return y.cpu()


# What Python can import.


def _called(name: str) -> nn.Module:
    """The module that `package.module:callable` or `FILE.py:callable` returns, or is.

    Raises: InvalidInputError, ArtifactError.
    """
    from torch import nn

    place, _, attribute = name.partition(":")
    found: Any = _imported(place, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [each for each in vars(found) if each[0] != "_"]
            raise InvalidInputError(
                f"{name}: '{place}' has no {attribute!r}; {near_names(attribute, known)}"
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InvalidInputError(
            f"{name}: expected a callable that returns a torch.nn.Module, or a module, got "
            f"{type(found).__name__}"
        )
    try:
        with seeded():
            model = found()
    except (Exception, SystemExit) as error:
        _refuse(f"{name}() failed", error, "It is called without arguments")
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"{name}() returned {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


def _imported(place: str, name: str) -> Any:
    if place.endswith(".py"):
        return _imported_file(Path(place), name)
    folder = str(Path.cwd())  # As `python -m` would find it.
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        hint = "Modules are found as `python -c 'import ...'` finds them in this folder"
        _refuse(f"{name}: '{place}' cannot be imported", error, hint)


def _imported_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise ArtifactError(
            f"{name}: expected a Python file, got {'a folder' if path.is_dir() else 'no such file'}"
        )
    # Under its own name, and with its neighbours in reach, as if Python ran it.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # Dataclasses and pickles look their module up.
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        _refuse(f"{name}: '{path}' cannot be imported", error, "Run it with python to see more")
    return module


def _refuse(what: str, error: BaseException, hint: str) -> NoReturn:
    """Raises: InvalidInputError with the error's last line outside of this file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if not f.filename.startswith(("<frozen", importlib.__file__))]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    said = f"{type(error).__name__}: {error}".strip().rstrip(": ")
    raise InvalidInputError(f"{what}{where}: {said}. {hint}") from error
