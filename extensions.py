"""Ops, pointwise functions and fusions of other packages: what they declare, how they are found.

A package declares one `Extension` and names it in the entry-point group `convloom.extensions`; a
program may give one to `register` instead. All are loaded when the tables of ops are made: at the
first compile or load, or when somebody first looks at a table. The tables are closed then, so that
results depend on what is installed and never on the order of imports.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from . import settings
from .errors import ExtensionError, near_names

GROUP = "convloom.extensions"
LEAVE_OUT = "CONVLOOM_EXTENSIONS=none leaves all extensions out"
RESERVED = ("convloom", "torch", "triton")
"""Names of whose versions files tell anyway."""


@dataclass(frozen=True)
class Extension:
    """What a package adds, declared once in a module that can be imported by its name.

    name, version: of the package's distribution, as `pip` knows it. scalars: pointwise functions
    (`kernels.contract.scalars.Scalar`). ops: `kernels.contract.op.Op`. fusions:
    `compiler.fusion.pattern.Rule`; those with a `build` are proposed where the compiler chooses
    what becomes one kernel, those with a `rewrite` are applied first of all. words: every text that
    an attribute of its ops may be (as "reflect"), so that files with others are refused.
    """

    name: str
    version: str
    scalars: tuple[Any, ...] = ()
    ops: tuple[Any, ...] = ()
    fusions: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", str(self.name)):
            raise ExtensionError(
                f"name: expected letters, digits, '.', '_', '-', got {self.name!r}"
            )
        if self.name in RESERVED:
            raise ExtensionError(f"an extension cannot be called {self.name!r}; give another name")
        if not re.fullmatch(r"[A-Za-z0-9.+!_-]{1,60}", str(self.version)):
            raise ExtensionError(f"{self.name}: version: expected as '1.0', got {self.version!r}")

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def summary(self) -> str:
        """How many things of each kind it adds."""
        kinds = ("pointwise function", self.scalars), ("op", self.ops), ("fusion", self.fusions)
        counts = (f"{len(them)} {kind}{'s' * (len(them) != 1)}" for kind, them in kinds if them)
        return ", ".join(counts) or "nothing"


@dataclass(frozen=True)
class Found:
    """An extension that has not been imported yet. place: "package.module:NAME"."""

    name: str
    version: str
    place: str

    def load(self) -> Extension:
        """The declaration. Raises: ExtensionError where there is none."""
        extension = _imported(self.place, f"the extension {self.name} {self.version}")
        if (extension.name, extension.version) != (self.name, self.version):
            raise ExtensionError(
                f"{self.place} says that it is {extension}, but the package that it is in is "
                f"{self.name} {self.version}: take both from importlib.metadata, or install again"
            )
        return extension


@dataclass
class _State:
    registered: dict[str, Extension]
    loaded: tuple[Extension, ...] | None = None
    is_loading: bool = False


_STATE = _State({})


def register(extension: Extension | str) -> None:
    """Adds an extension of this program, which no entry point names.

    extension: the declaration, or where it stands ("package.module:NAME"). It must be in a module
    that can be imported by name, which a script or a notebook cannot: processes that tune and
    compile import it again.

    Raises: ExtensionError where another one has its name, or the tables of ops are made already.
    """
    if isinstance(extension, str):
        extension = _imported(extension, "convloom.register")
    if not isinstance(extension, Extension):
        raise ExtensionError(
            f"convloom.register: expected a convloom.Extension or its place as "
            f"'package.module:NAME', got {type(extension).__name__}"
        )
    if _STATE.registered.get(extension.name) == extension:
        return
    if extension.name in (*_STATE.registered, *(found.name for found in _entry_points())):
        raise ExtensionError(
            f"convloom.register: there is an extension {extension.name} already; one that an entry "
            "point names need not be registered"
        )
    if _STATE.loaded is not None or _STATE.is_loading:
        raise ExtensionError(
            f"convloom.register: too late for {extension}: the tables of ops are made at the first "
            "compile or load, and closed then. Register it before, or name it in the entry-point "
            f"group {GROUP} of a package"
        )
    _STATE.registered[extension.name] = extension


def installed() -> dict[str, str]:
    """The version of every extension by name, those that are left out too; none is imported."""
    versions = {found.name: found.version for found in _entry_points()}
    return versions | {each.name: each.version for each in _STATE.registered.values()}


def is_wanted(name: str) -> bool:
    """Whether CONVLOOM_EXTENSIONS leaves an extension in.

    Raises: ExtensionError where it names one that is not there.
    """
    wanted = settings.read().extensions
    for each in wanted or ():
        if each not in installed():
            known = near_names(each, installed()) if installed() else "none is installed"
            raise ExtensionError(f"CONVLOOM_EXTENSIONS: no extension {each!r}; {known}")
    return wanted is None or name in wanted


def loaded() -> tuple[Extension, ...]:
    """All extensions that are not left out, by name. From then on no other one can be registered.

    Raises: ExtensionError for one that cannot be imported, or is not what it says.
    """
    if _STATE.loaded is None:
        if _STATE.is_loading:
            raise ExtensionError(
                "an extension asks for convloom's tables of ops, rules or passes while it is "
                "being imported: import those inside the functions that need them"
            )
        _STATE.is_loading = True
        try:
            found = {each.name: each.load() for each in _entry_points() if is_wanted(each.name)}
            own = {n: each for n, each in _STATE.registered.items() if is_wanted(n)}
            _STATE.loaded = tuple(each for _, each in sorted({**found, **own}.items()))
        finally:
            _STATE.is_loading = False
    return _STATE.loaded


def registered_places() -> tuple[str, ...]:
    """Where those that were registered stand: what other processes register."""
    return tuple(map(_place_of, _STATE.registered.values()))


def why_missing(name: str, version: str) -> str | None:
    """Why something that was made with an extension cannot be used in this process, and what to do
    about it; None where it can."""
    made = f"made with the extension {name} {version}"
    if name not in installed():
        return f"{made}, which is not installed here: pip install {name}=={version}"
    if installed()[name] != version:
        return (
            f"{made}, and here {name} {installed()[name]} is installed: pip install "
            f"{name}=={version}, or make it again"
        )
    if not is_wanted(name):
        return f"{made}, which CONVLOOM_EXTENSIONS leaves out here: unset it"
    return None


def missing(versions: Iterable[tuple[str, str]]) -> Iterator[str]:
    """`why_missing` of each extension that is named with its version."""
    for name, version in versions:
        if name not in RESERVED and (reason := why_missing(name, version)) is not None:
            yield reason


def _entry_points() -> list[Found]:
    """By name. Raises: ExtensionError where one distribution names two."""
    found: dict[str, Found] = {}
    for point in metadata.entry_points(group=GROUP):
        assert point.dist is not None
        each = Found(point.dist.metadata["Name"], point.dist.version, point.value)
        # A distribution may be found twice, as when it is installed and on the path.
        if found.setdefault(each.name, each) != each:
            raise ExtensionError(
                f"{each.name} names two extensions, {found[each.name].place} and {each.place}: "
                f"declare one for each package. {LEAVE_OUT}"
            )
    return [found[name] for name in sorted(found)]


def _imported(place: str, what: str) -> Extension:
    module_name, _, name = place.partition(":")
    if not re.fullmatch(r"[\w.]+:\w+", place):
        raise ExtensionError(f"{what}: expected 'package.module:NAME', got {place!r}")
    try:
        module = importlib.import_module(module_name)
    except ExtensionError:
        raise
    except Exception as error:  # A stranger's package may raise anything at all.
        raise ExtensionError(
            f"{what}: {module_name} cannot be imported: {type(error).__name__}: {error}. "
            f"{LEAVE_OUT}"
        ) from error
    extension = getattr(module, name, None)
    if not isinstance(extension, Extension):
        half = getattr(module.__spec__, "_initializing", False)
        raise ExtensionError(
            f"{what}: {place} is being imported itself, and asks for convloom's tables of ops, "
            "rules or passes: import those inside the functions that need them"
            if half
            else f"{what}: expected a convloom.Extension at {place}, got {extension!r:.60}. "
            f"{LEAVE_OUT}"
        )
    return extension


def _place_of(extension: Extension) -> str:
    for module_name, module in sorted(sys.modules.items()):
        if module_name == "__main__":
            continue
        for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
            if value is extension:
                return f"{module_name}:{name}"
    raise ExtensionError(
        f"the extension {extension} is not a global of a module that can be imported by its name, "
        "which processes that tune need: move it from the script into a file of its own"
    )
