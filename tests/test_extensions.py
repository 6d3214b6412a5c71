"""Ops, functions and fusions of other packages: the example in docs/examples, and what is refused.

Here nothing is installed: the example is, in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import convloom
import pytest
import torch
import triton
from convloom import Extension, extensions, settings
from convloom.cli import doctor
from convloom.compiler.fusion import extension_rules
from convloom.compiler.fusion.pattern import Call, Rule
from convloom.compiler.passes import LABELS
from convloom.compiler.passes.recognise import SQUARE
from convloom.compiler.records.keys import Key
from convloom.errors import ArtifactError, ExtensionError
from convloom.kernels import registry
from convloom.kernels.contract.scalars import Scalar
from convloom.kernels.movement.pointwise import Pointwise

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "shift"
ME = ("me", "1.0")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the example into, without the network."""
    source, folder = tmp_path_factory.mktemp("source") / "shift", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)  # Building writes beside the code.
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *options, "--target", folder, source],
        check=True,
    )
    return folder


def run(
    installed: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python that has the example installed."""
    path = os.pathsep.join((str(installed), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=installed,
    )


@pytest.mark.interpreter
def test_the_example_has_every_property(installed: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-c", EXAMPLE / "pyproject.toml")
    done = run(installed, "-m", "pytest", EXAMPLE / "tests", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 40


SCRIPT = """
import json, sys
from dataclasses import asdict
import convloom, torch
from convloom_shift import bent_identity, shift

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 20, 3, padding=1)
    def forward(self, x):
        return shift(torch.relu(x)), shift(bent_identity(self.conv(x)))

torch.manual_seed(0)
net, x = Net().eval(), torch.randn(2, 3, 9, 7)
exe = convloom.compile(net, (x,), target="interpreter")
for y, wanted in zip(exe(x), net(x)):
    torch.testing.assert_close(y, wanted)
exe.save(sys.argv[1])
for y, wanted in zip(convloom.load(sys.argv[1])(x), net(x)):
    torch.testing.assert_close(y, wanted)
apart = convloom.compile(net, (x,), target="interpreter", forbid=("into-shift",))

from convloom.compiler.records.keys import key_of
from convloom.cli import doctor
from convloom.compiler.run.workers import WorkerProcess
from convloom.kernels.contract.targets import INTERPRETER
steps = [step for step, _ in exe.plan.kernels]
keys = [asdict(key_of(step.problem, INTERPRETER)) for step in steps]
worker = WorkerProcess(__import__("convloom_shift_worker").Known)
print(json.dumps({
    "explained": exe.explain(), "keys": keys, "versions": convloom.load(sys.argv[1])
    .artifact.document.versions, "kernels": len(steps), "apart": len(apart.kernels),
    "worker": worker.ask("shift", 300), "doctor": [*map(asdict, doctor._extensions())],
}))
"""
WORKER = """
class Known:
    def __call__(self, name):
        from convloom.kernels import registry
        return registry.get(name).name
"""


@pytest.mark.interpreter
def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    """Blocks that begin with the name of a file are those files; all run in one process."""
    page = (ROOT / "docs" / "extensions.md").read_text()
    found = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    named = [re.match(r"# (\w+\.py)\n", code) for code in found]
    assert len(found) == 3
    names = [name[1] if name else f"block{at}.py" for at, name in enumerate(named)]
    for name, code in zip(names, found, strict=True):
        tmp_path.joinpath(name).write_text(code)
    imports = "\n".join(f"import {name.removesuffix('.py')}" for name in names)
    done = run(tmp_path, "-c", imports)
    assert done.returncode == 0, done.stderr


POOL = """
from dataclasses import replace

import torch
import torch.nn.functional as F
from convloom import Extension
from convloom.compiler.fusion.conv_then import conv_then
from convloom.kernels.fused import conv_pool
from convloom.kernels.pooling import pool
from convloom.kernels.pooling.pool_window import MaxPool2d

@torch.library.custom_op("own::pool", mutates_args=())
def own_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 2)

@own_pool.register_fake
def _(x):
    return F.max_pool2d(x, 2)

class OwnPool(MaxPool2d):
    pass

def capture(g, a):
    return g.apply("own_pool", (a.x,), OwnPool((2, 2), (2, 2)))

OP = replace(pool.OPS[0], name="own_pool", attributes=OwnPool, aten={"own.pool.default": capture})
THEN = conv_then(conv_pool.OP, "own-pool", ("own_pool",), conv_pool.ConvPool)
EXTENSION = Extension("own-pool", "1.0", ops=(OP,), fusions=THEN.rules)
"""
POOLED = """
import convloom
import torch
convloom.register("own_pool:EXTENSION")
from own_pool import own_pool

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    def forward(self, x):
        return own_pool(self.conv(x))

net, x = Net().eval(), torch.randn(1, 3, 8, 8)
exe = convloom.compile(net, (x,), target="reference")
torch.testing.assert_close(exe(x), net(x))
assert "own-pool  own_pool(conv2d(x, w)) => conv_pool(x, w)" in exe.explain()
"""


def test_what_follows_a_convolution_is_declared_with_a_plain_import(tmp_path: Path) -> None:
    tmp_path.joinpath("own_pool.py").write_text(POOL)
    done = run(tmp_path, "-c", POOLED)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def told(installed: Path) -> dict[str, Any]:
    """What a process with the extension made of a network."""
    script = installed / "script.py"
    script.write_text(SCRIPT)
    installed.joinpath("convloom_shift_worker.py").write_text(WORKER)
    done = run(installed, script, installed / "net.loom")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.interpreter
def test_the_example_is_captured_fused_explained_and_saved(told: dict[str, Any]) -> None:
    assert told["apart"] == told["kernels"] + 1
    assert re.search(r"into-shift +shift\(f\(x\)\) => shift\(x, before=", told["explained"])
    assert ["convloom-shift", "1.0"] in told["versions"]
    assert told["worker"] == "shift"


def test_a_file_without_its_package_says_what_is_missing(
    told: dict[str, Any], installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = installed / "net.loom"
    wanted = "was made with the extension convloom-shift 1.0, "
    with pytest.raises(ArtifactError) as caught:
        convloom.load(path)
    assert str(caught.value) == (
        f"'{path}' cannot be used: it {wanted}which is not installed here: pip install "
        "convloom-shift==1.0"
    )
    found = [extensions.Found("convloom-shift", "2.0", "a:B")]
    monkeypatch.setattr(extensions, "_entry_points", lambda: found)
    with pytest.raises(ArtifactError, match=r"and here convloom-shift 2.0 is installed: pip inst"):
        convloom.load(path)
    found[0] = replace(found[0], version="1.0")
    monkeypatch.setenv("CONVLOOM_EXTENSIONS", "none")
    with pytest.raises(ArtifactError, match="which CONVLOOM_EXTENSIONS leaves out here: unset"):
        convloom.load(path)


def test_records_name_the_extension_and_are_refused_without_it(told: dict[str, Any]) -> None:
    keys = [Key(**{k: tuple(v) if isinstance(v, list) else v for k, v in key.items()})
            for key in told["keys"]]  # fmt: skip
    named = [key for key in keys if "convloom-shift 1.0" in key.source]
    assert {"shift", "stem"} <= {key.op for key in named} or len(named) >= 2
    for key in named:
        assert key.stale == (
            "it was made with the extension convloom-shift 1.0, which is not installed here: "
            "pip install convloom-shift==1.0"
        )


def test_doctor_lists_extensions(told: dict[str, Any]) -> None:
    (check,) = told["doctor"]
    assert (check["name"], check["status"]) == ("extension convloom-shift", "ok")
    assert check["found"] == "1.0: 1 pointwise function, 1 op, 1 fusion"


# What is refused, without a package.


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Extension]]:
    """As before anything was compiled; gives what has been registered."""
    state = extensions._State({})
    monkeypatch.setattr(extensions, "_STATE", state)
    yield state.registered


def in_module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> str:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return name


def test_registered_before_the_first_table_and_never_after(
    fresh: dict[str, Extension], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Extension(*ME)
    in_module(monkeypatch, "their_module", MINE=mine)
    convloom.register("their_module:MINE")
    convloom.register(mine)
    assert fresh == {"me": mine} and extensions.registered_places() == ("their_module:MINE",)
    with pytest.raises(ExtensionError, match="there is an extension me already"):
        convloom.register(Extension("me", "2.0"))
    assert extensions.loaded() == (mine,)
    with pytest.raises(ExtensionError, match=r"too late for other 1.0: the tables of ops are made"):
        convloom.register(Extension("other", "1.0"))
    with pytest.raises(ExtensionError, match=r"expected a convloom\.Extension .*, got int"):
        convloom.register(3)  # type: ignore[arg-type]


def test_one_that_only_a_script_has_is_refused(fresh: dict[str, Extension]) -> None:
    convloom.register(Extension(*ME))
    with pytest.raises(ExtensionError, match=r"me 1.0 is not a global of a module that can be i"):
        extensions.registered_places()


def test_the_switch(fresh: dict[str, Extension], monkeypatch: pytest.MonkeyPatch) -> None:
    convloom.register(Extension(*ME))
    convloom.register(Extension("other", "1.0"))
    monkeypatch.setenv("CONVLOOM_EXTENSIONS", "none")
    assert settings.read().extensions == frozenset()
    assert [c.status for c in doctor._extensions()] == ["left out", "left out"]
    extensions._STATE.loaded = None
    monkeypatch.setenv("CONVLOOM_EXTENSIONS", "oter")
    with pytest.raises(ExtensionError, match=r"no extension 'oter'; did you mean other"):
        extensions.loaded()
    monkeypatch.setenv("CONVLOOM_EXTENSIONS", "other")
    assert [each.name for each in extensions.loaded()] == ["other"]


BROKEN = (
    ("no:such:place", "expected 'package.module:NAME', got 'no:such:place'"),
    ("no_such_module:NAME", "no_such_module cannot be imported: ModuleNotFoundError"),
    ("their_module:NUMBER", "expected a convloom.Extension at their_module:NUMBER, got 3"),
    ("their_module:OTHER", "says that it is other 1.0, but the package that it is in is me 1.0"),
    ("half_module:MINE", "half_module:MINE is being imported itself, and asks for convloom's"),
)


@pytest.mark.parametrize(("place", "message"), BROKEN)
def test_entry_points_that_name_no_extension(
    fresh: dict[str, Extension], monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    in_module(monkeypatch, "their_module", NUMBER=3, OTHER=Extension("other", "1.0"))
    spec = type("Spec", (), {"_initializing": True})()
    in_module(monkeypatch, "half_module", __spec__=spec)
    monkeypatch.setattr(extensions, "_entry_points", lambda: [extensions.Found(*ME, place)])
    with pytest.raises(ExtensionError, match=re.escape(message)):
        extensions.loaded()
    (check,) = doctor._extensions()
    assert (check.status, check.disables) == (doctor.BROKEN, doctor.EVERYTHING)


def test_tables_that_are_asked_for_too_early(
    fresh: dict[str, Extension], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions._STATE, "is_loading", True)
    with pytest.raises(ExtensionError, match="asks for convloom's tables of ops"):
        extensions.loaded()


@triton.jit
def bend(v):  # type: ignore[no-untyped-def]
    return v


class OtherPointwise(Pointwise):
    """Attributes of their own."""


OtherPointwise.__name__ = "Pointwise"
RELU = registry.get("relu")
FINE = Scalar("bend", bend, torch.relu)
FAULTS = (
    ({"scalars": (3,)}, "scalars: expected Scalars, got int"),
    ({"ops": (RELU,)}, "there is an op 'relu' already; choose another name"),
    ({"ops": (replace(RELU, name="load", aten={}),)}, "there is a stage 'load' already"),
    (
        {"ops": (replace(RELU, name="relu7"),)},
        "there is the capture of 'aten.relu.default' already",
    ),
    ({"scalars": (FINE, FINE)}, "there is an op 'bend' already"),
    ({"ops": (replace(RELU, name="Relu", aten={}),)}, "expected a name of small letters"),
    (
        {"ops": (replace(RELU, name="relu7", aten={}, attributes=OtherPointwise),)},
        "op relu7: there are attributes called Pointwise already",
    ),
    (
        {"ops": (replace(RELU, name="relu7", aten={}, attributes=int),)},
        "op relu7: its attributes are no dataclass made of op.Attributes",
    ),
    ({"scalars": (replace(FINE, function=torch.relu),)}, "its function is no @triton.jit function"),
    ({"scalars": (replace(FINE, operands=3),)}, "expected a function of 1 or 2 tensors, got 3"),
    (
        {"scalars": (replace(FINE, parameters=("a",)),)},
        "expected 1 numbers in each of its examples",
    ),
)


@pytest.mark.parametrize(("added", "message"), FAULTS)
def test_ops_that_clash_or_break_their_contract(
    monkeypatch: pytest.MonkeyPatch, added: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(extensions, "loaded", lambda: (Extension(*ME, **added),))
    with pytest.raises(ExtensionError, match=re.escape(message)) as caught:
        registry._tables.__wrapped__()
    assert str(caught.value).startswith("the extension me 1.0: ")
    assert "bend" not in registry.scalars.BY_NAME


def rule(**changes: Any) -> Rule:
    given = {"name": "f(x) => g(x)", "pattern": Call("relu"), "rewrite": SQUARE.rewrite} | changes
    return Rule(**given)


RULES = (
    ((3,), "fusions: expected Rules, got int"),
    ((rule(name="fuses"),), "'fuses': expected an equation"),
    ((rule(rewrite=None),), "expected a rewrite or a build, got neither"),
    ((rule(build=lambda graph, found: None),), "expected a rewrite or a build, got both"),
    ((rule(rewrite=None, build=lambda graph, found: None),), "expected a label"),
    ((rule(pattern=Call("relu7")),), "there is no op 'relu7'"),
    ((rule(name=SQUARE.name),), "there is a fusion of rule 'x·x => square(x)' already"),
    ((rule(), rule()), "there is a fusion of rule 'f(x) => g(x)' already"),
    ((rule(label="conv-pool"),), "there is a fusion of label 'conv-pool' already"),
)


@pytest.mark.parametrize(("fusions", "message"), RULES)
def test_fusions_that_clash_or_break_their_contract(
    monkeypatch: pytest.MonkeyPatch, fusions: tuple[Any, ...], message: str
) -> None:
    monkeypatch.setattr(extensions, "loaded", lambda: (Extension(*ME, fusions=fusions),))
    with pytest.raises(ExtensionError, match=re.escape(message)) as caught:
        extension_rules.check([*LABELS.all, SQUARE.name], LABELS.all.values())
    assert str(caught.value).startswith("the extension me 1.0: ")


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("a b", "1", "name: expected letters"),
        ("torch", "1", "an extension cannot be called 'torch'"),
        ("me", "1 0", "me: version: expected as '1.0', got '1 0'"),
    ],
)
def test_names_and_versions(name: str, version: str, message: str) -> None:
    with pytest.raises(ExtensionError, match=re.escape(message)):
        Extension(name, version)


def test_tests_of_an_extension_need_all_problems_and_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from convloom import testing

    mine = Extension(*ME, ops=(RELU,))
    with pytest.raises(ExtensionError, match=r"me 1.0 is not among the extensions of this process"):
        testing.tests_of(mine)
    monkeypatch.setattr(extensions, "loaded", lambda: (mine,))
    with pytest.raises(ExtensionError, match="domains: the op 'relu' has none; add one"):
        testing.tests_of(mine)
    monkeypatch.setattr(extensions, "loaded", lambda: (Extension(*ME),))
    with pytest.raises(ExtensionError, match="examples: the extension has no fusion 'f'"):
        testing.tests_of(Extension(*ME), examples={"f": testing.Example(lambda: ())})
