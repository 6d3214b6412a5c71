"""`convloom doctor`: what this machine has, what is missing, and what that disables; or whether a
saved executable is what it says."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__, extensions, settings
from ..atomic import private_folder
from ..errors import ExtensionError
from . import options as shared
from . import output

if TYPE_CHECKING:
    import torch
    from rich.table import Table

OK, MISSING, BROKEN, UNCOMPARED = "ok", "missing", "broken", "not compared"
LEFT_OUT = "left out"
EXIT_UNCOMPARED = 3
EVERYTHING = "everything but the list of models and this report"
REQUIRED = ("torch", "triton", "numpy", "networkx", "safetensors", "rich")
OPTIONAL = {"PIL": "reading images, the demo", "sklearn": "the demo, the digits data"}
TESTED = {"torch": ("2.11", "2.15"), "triton": ("3.6", "3.9")}
"""The oldest and the newest releases that the tests have run with."""
TOOLS = {
    "ptxas": "compiling for GPUs",
    "nvdisasm": "instruction counts and `explain --sass`",
    "cuobjdump": "register and spill counts",
}


@dataclass(frozen=True)
class Check:
    """One finding. `disables` says what does not work where the status is not "ok"."""

    name: str
    status: str
    found: str
    disables: str = ""


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "doctor", help="check this machine",
        description="Checks Python, the libraries, the GPU, the compiler's tools and the cache, "
        "and tries a tiny model. Exits with 1 where nothing could be compiled, with --strict also "
        "where something is broken. With FILE it checks a saved executable instead: every hash, "
        "every launch, and that every byte is what its graph gives when it is compiled again; "
        "exits with 1 where something is not, with "
        f"{EXIT_UNCOMPARED} where something cannot be compared here.",
    )
    parser.add_argument("--strict", action="store_true",
                        help="exit with 1 where anything is broken, such as the cache")
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="a saved executable")


def run(options: argparse.Namespace) -> int:
    if options.file is not None:
        checks = list(examine_file(options.file))
        given = {check.status for check in checks}
        status = 1 if BROKEN in given else EXIT_UNCOMPARED if UNCOMPARED in given else 0
    else:
        checks = list(examine())
        broken = options.strict and any(check.status == BROKEN for check in checks)
        status = int(broken or any(c.disables == EVERYTHING and c.status != OK for c in checks))
    found = {"ok": not status, "checks": [asdict(check) for check in checks]}
    output.answer(options, found, _table(checks))
    return status


def examine() -> Iterator[Check]:
    """Every check; what cannot be tried because something else is missing is left out."""
    status = OK if sys.version_info >= (3, 11) else BROKEN
    version = platform.python_version()
    yield Check("python", status, f"{version}, 3.11 or newer is needed", EVERYTHING)
    yield Check("convloom", OK, __version__)
    libraries = [_library(name, EVERYTHING) for name in REQUIRED]
    yield from libraries
    yield from (_library(name, disables) for name, disables in OPTIONAL.items())
    present = {check.name for check in libraries if check.status == OK}
    if "torch" in present:
        yield _gpu()
        yield _c_compiler()
    if "triton" in present:
        yield from (_tool(name, disables) for name, disables in TOOLS.items())
    yield _cache()
    if present == set(REQUIRED):
        yield from _extensions()
        disables = "target interpreter, which runs without a GPU"
        yield _probe("interpreter", _probe_interpreter, disables)
        yield _probe("cross-compilation", _probe_cross_compilation, "targets cuda and cuda:sm_*")


def examine_file(path: Path) -> Iterator[Check]:
    """What can be said of a saved executable without a GPU.

    Raises: ArtifactError where it is none.
    """
    from ..compiler.artifact import rederive
    from ..compiler.artifact.read import open_artifact
    from . import files

    artifact = open_artifact(path)
    found = files.facts(artifact)
    yield Check("file", OK, f"{found['model']}, sha256 {artifact.sha256}")
    yield Check("programs", OK, artifact.holds())
    yield Check("made with", OK, ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    kinds = {"weights": "safetensors", "machine code": "cubin", "PTX": "ptx"}
    sizes = [f"{w} {output.readable_size(artifact.size_bytes(k))}" for w, k in kinds.items()]
    yield Check("sizes", OK, ", ".join(sizes))
    # Not with what was compiled before: a cache says what was written there.
    with output.working(f"making {path} again"), rederive.nothing_compiled_yet():
        differing = rederive.differences(artifact)
    text = "; ".join(differing) or "plan and weights: what the graphs give here"
    yield Check("made again", BROKEN if differing else OK, text, "trust in what it computes")
    if not rederive.compares_code(artifact):
        text = f"made with triton {found['versions'].get('triton', 'unknown')}, this is another"
        yield Check("machine code", UNCOMPARED, text, "trust in what its kernels do")
    elif artifact.size_bytes("cubin"):
        status, text = (BROKEN, "see above") if differing else (OK, "what the graphs give here")
        yield Check("machine code", status, text, "trust in what its kernels do")
    yield Check("on trust", OK, "the graphs with their weights and names, the ledgers, the model "
                "and the versions named above: nothing else in the file says what they should be")


def _library(name: str, disables: str) -> Check:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # A broken installation may raise anything at all.
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return Check(name, MISSING, "not installed", disables)
        return Check(name, BROKEN, f"cannot be imported: {_first_line(error)}", disables)
    version = str(getattr(module, "__version__", None) or _installed_version(name))
    if name in TESTED:
        own, *ends = (tuple(map(int, each.split(".")[:2])) for each in (version, *TESTED[name]))
        if not ends[0] <= own <= ends[1]:
            version += f" (tested with {' to '.join(TESTED[name])})"
    return Check(name, OK, version, disables)


def _installed_version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "installed"


def _gpu() -> Check:
    import torch

    from ..errors import TargetUnavailableError
    from ..kernels.contract import targets

    disables = "target cuda; cuda:sm_* compiles all the same, and the interpreter runs"
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return Check("gpu", MISSING, f"no usable GPU (torch was built with {built})", disables)
    name = torch.cuda.get_device_name()
    try:
        target = targets.parse("cuda")
    except TargetUnavailableError as error:
        return Check("gpu", BROKEN, f"{name}: {error}", disables)
    return Check("gpu", OK, f"{name}, code for {target.name}", disables)


def _c_compiler() -> Check:
    """Triton builds the small function that launches a kernel with it and Python's headers."""
    disables = "target cuda, whose kernels are launched through a compiled function"
    found = shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return Check("C compiler", MISSING, "no gcc, clang", disables)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        text = f"{found}, but no {header}: install Python's development files (python3-dev)"
        return Check("C compiler", MISSING, text, disables)
    return Check("C compiler", OK, found, disables)


def _tool(name: str, disables: str) -> Check:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    where = str(path) if path.is_file() else f"not in the triton package: {path}"
    return Check(name, OK if path.is_file() else MISSING, where, disables)


def _cache() -> Check:
    disables = "compiling for GPUs; set CONVLOOM_CACHE_DIR to a folder that can be written"
    folder = settings.read().cache_dir
    try:
        private_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            return Check("cache", OK, str(folder), disables)
    except OSError as error:
        return Check("cache", BROKEN, f"{folder}: {error.strerror or error}", disables)


def _extensions() -> Iterator[Check]:
    """Those of other packages; one that is broken is named, and nothing can be compiled with it."""
    try:
        versions = extensions.installed()
        for name, version in versions.items():
            if not extensions.is_wanted(name):
                text = f"{version}, by CONVLOOM_EXTENSIONS"
                yield Check(f"extension {name}", LEFT_OUT, text, "its ops and fusions")
        importlib.import_module("..compiler.passes", __package__)
        for extension in extensions.loaded():
            text = f"{extension.version}: {extension.summary}"
            yield Check(f"extension {extension.name}", OK, text)
    except ExtensionError as error:
        yield Check("extensions", BROKEN, str(error), EVERYTHING)


def _probe(name: str, tried: Callable[[], str], disables: str) -> Check:
    """Compiles, and where it can be, runs a tiny model."""
    try:
        return Check(name, OK, tried(), disables)
    except Exception as error:  # Whatever it is, it is the finding.
        return Check(name, BROKEN, f"{type(error).__name__}: {_first_line(error)}", disables)


def _probe_interpreter() -> str:
    import torch

    from ..compiler.api import compile

    model, x = _tiny_model()
    y = compile(model, (x,), target="interpreter")(x)
    torch.testing.assert_close(y, model(x))
    return "a tiny model gives what torch gives"


def _probe_cross_compilation() -> str:
    from ..compiler.api import compile

    model, x = _tiny_model()
    kernel = compile(model, (x,), target="cuda:sm_90").kernels[-1]
    return f"a tiny model compiles for sm_90: {kernel.report().registers} registers"


def _tiny_model() -> tuple[torch.nn.Module, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, generator=generator)
    return torch.nn.Linear(8, 8).eval().requires_grad_(False), x


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _table(checks: list[Check]) -> Table:
    from rich.text import Text

    colors = {BROKEN: "red"} | dict.fromkeys((MISSING, UNCOMPARED, LEFT_OUT), "yellow")
    rows = [
        (check.name, Text(check.status, colors.get(check.status, "green")), check.found,
         "" if check.status == OK else check.disables)
        for check in checks
    ]
    shown = output.table(("check", "status", "found", "so these do not work"), rows)
    shown.columns[2].overflow = "fold"
    return shown
