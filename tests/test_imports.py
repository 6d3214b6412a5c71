"""Imports run one way: who may know whom, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

pytestmark = pytest.mark.untraced  # Sources are read, not run.
ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "compiler", "zoo", "cli", "benchmarks")
USERS = ("tests", "benchmarks")
"""Rooms that use convloom as everybody does."""

# What of convloom each room may import, besides itself; "" is the facade.
ALLOWED = {
    "errors": (),
    "settings": ("errors",),
    "atomic": (),
    "extensions": ("errors", "settings"),
    "progress": (),
    "kernels": ("errors", "settings", "atomic", "progress", "extensions"),
    "compiler": ("errors", "settings", "atomic", "progress", "extensions", "kernels"),
    "zoo": ("errors",),
    # What extensions test themselves with: of the tests only what is shipped.
    "testing": ("errors", "extensions", "kernels", "tests.properties"),
    "": ("errors", "settings", "extensions", "testing", "compiler", "zoo"),
    "__main__": ("cli",),
    # Of the kernels a command may know what describes machines and problems, never a kernel.
    "cli": (
        "", "errors", "settings", "atomic", "progress", "extensions", "compiler", "zoo",
        "kernels.contract.targets", "kernels.contract.op", "kernels.contract.spec",
        "kernels.devices.offline", "benchmarks",
    ),
    # Benchmarks run from a checkout; some of them time what the tests draw or write.
    "benchmarks": (
        "", "errors", "settings", "atomic", "kernels", "compiler", "zoo", "tests.domains",
        "tests.whole_nets",
    ),
}  # fmt: skip

# What of others each room may import, besides the standard library.
LIBRARIES = {
    "errors": (),
    "settings": (),
    "atomic": (),
    "progress": (),
    "extensions": (),
    "testing": ("pytest", "hypothesis"),
    "kernels": ("torch", "triton", "numpy"),
    "compiler": ("torch", "networkx", "numpy", "safetensors", "onnx"),
    "zoo": ("torch", "numpy", "safetensors", "sklearn"),
    "": (),
    "__main__": (),
    "cli": ("torch", "triton", "numpy", "rich", "PIL", "sklearn"),
    # PIL, ray and starlette: the examples; tinygrad: where it is installed.
    "benchmarks": ("torch", "triton", "numpy", "rich", "PIL", "ray", "starlette", "tinygrad"),
}
STANDARD_LIBRARY = frozenset(__import__("sys").stdlib_module_names)


# The floors inside two rooms, from the ground up: a folder imports what stands below it.
FLOORS = {
    "kernels": (
        ("contract",), ("tile",), ("hopper",), ("movement",), ("normalisation",),
        ("products", "pooling"), ("convolution",), ("fused",), ("registry",), ("devices",),
    ),
    "compiler": (
        ("graph", "onnx"), ("fusion", "records", "evaluation", "capture"), ("plan", "passes"),
        ("explain",), ("run",), ("artifact", "tuning"), ("api",), ("torch_compile",),
    ),
}  # fmt: skip
MOST_FILES = 16
"""In one folder, its `__init__.py` included."""


def room_of(path: Path) -> str:
    """The room of a file: its top folder, or its own name at the top; the facade is ""."""
    parts = path.relative_to(ROOT).parts
    if len(parts) > 1:
        return parts[0]
    return "" if path.name == "__init__.py" else path.stem


def sources() -> list[Path]:
    inner = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return sorted([*ROOT.glob("*.py"), *inner])


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is convloom's own, then without "convloom.") of every import."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _own(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield _own(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            if node.module:
                base = (*base, *node.module.split("."))
            for alias in node.names:
                yield from _named(base, alias.name)


def _named(base: tuple[str, ...], name: str) -> Iterator[tuple[str, bool]]:
    """`from base import name`: the module of that name, or the module that defines it."""
    folder = ROOT.joinpath(*base)
    if (folder / f"{name}.py").exists() or (folder / name).is_dir():
        yield ".".join((*base, name)), True
    else:
        yield ".".join(base), True


def _own(name: str) -> tuple[str, bool]:
    top, _, rest = name.partition(".")
    return (rest, True) if top == "convloom" else (name, False)


def _is_within(name: str, allowed: str) -> bool:
    return name == allowed or (bool(allowed) and name.startswith(f"{allowed}."))


def test_imports_run_one_way() -> None:
    for path in sources():
        room, where = room_of(path), path.relative_to(ROOT)
        assert room in ALLOWED, f"{where}: what may this new file import? Say so in ALLOWED"
        for name, own in imported(path):
            if own:
                known = (room, *ALLOWED[room])
                found = any(_is_within(name, each) for each in known)
                assert found, f"{where} imports convloom.{name}"
            else:
                top = name.partition(".")[0]
                known = (*LIBRARIES[room], "__future__")
                assert top in STANDARD_LIBRARY or top in known, f"{where} imports {top}"


def edges() -> nx.DiGraph:
    """Every import of one file of `kernels` or `compiler` by another, also where it is deferred or
    for types alone."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources()
        if room_of(path) in FLOORS
    }
    graph = nx.DiGraph()
    for path in sources():
        if room_of(path) in FLOORS:
            user = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            used = {name for name, own in imported(path) if own and name in files}
            graph.add_edges_from((user, name) for name in used - {user})
    return graph


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = edges()
    assert graph.number_of_edges() > 500
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("room", FLOORS)
def test_imports_run_down_the_floors(room: str) -> None:
    height = {name: at for at, floor in enumerate(FLOORS[room]) for name in floor}
    for user, used in edges().edges:
        above, below = user.split(".")[1:2], used.split(".")[1:2]
        if user.startswith(f"{room}.") and used.startswith(f"{room}.") and above != below:
            assert height[above[0]] > height[below[0]], f"{user} imports {used}"


def test_every_folder_can_be_taken_in_at_a_glance() -> None:
    folders = {path.parent for path in sources() if room_of(path) in FLOORS}
    for folder in folders:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder.relative_to(ROOT)
    for room, floors in FLOORS.items():
        known = {name for floor in floors for name in floor}
        inner = {name.split(".")[1] for name in edges() if name.startswith(f"{room}.")}
        assert inner == known


package = [path for path in sources() if room_of(path) not in USERS]
users = sorted(path for room in USERS for path in (ROOT / room).glob("*.py"))


def nodes(paths: list[Path]) -> Iterator[tuple[Path, ast.AST]]:
    return ((path, node) for path in paths for node in ast.walk(ast.parse(path.read_text())))


def test_the_package_imports_itself_relatively() -> None:
    for path, node in nodes(package):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert not [name for name in names if name.partition(".")[0] == "convloom"], path


def test_users_import_the_package_absolutely() -> None:
    """Only what lies beside the file itself is found relatively."""
    for path, node in nodes(users):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path}:{node.lineno} climbs out of {path.parent.name}/"
            beside = [node.module] if node.module else [alias.name for alias in node.names]
            files = [path.parent.joinpath(*name.split(".")) for name in beside]
            assert all(file.is_dir() or file.with_suffix(".py").exists() for file in files), path


def test_the_reader_of_imports_sees_every_form() -> None:
    """Otherwise the tests above would pass by not looking."""
    found = set(imported(ROOT / "compiler" / "passes" / "__init__.py"))
    expected = {("settings", True), ("errors", True), ("compiler.graph.ir", True), ("time", False)}
    assert expected <= found
    assert ("kernels.contract.targets", True) in set(imported(ROOT / "cli" / "options.py"))
