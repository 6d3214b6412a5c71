"""Files that were changed in what they say, with every hash right: each is refused, or computes on
the interpreter and the reference what its graph says, and `doctor` names what else is not so."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from itertools import islice
from pathlib import Path

import convloom
import pytest
import torch
from convloom.compiler.artifact import rederive
from convloom.compiler.artifact.load import LoadedExecutable, explain, ledger_of
from convloom.compiler.artifact.read import Artifact, open_artifact
from convloom.compiler.evaluation.evaluate import evaluate
from convloom.compiler.explain import picture
from convloom.compiler.run import parity
from convloom.errors import ArtifactError, ConvloomError
from convloom.kernels.contract import tolerance

from .nets import Made, tensors_of
from .semantic_mutants import NETWORKS, Members, Mutant, Mutator, saved, write_mutant

pytestmark = pytest.mark.interpreter
FEW, MANY = 34, 334
"""Of each of six networks; many are 2,004."""
LONGEST_S = 5.0
MEMORY, SLACK = 1.5, 32 << 20
"""What may be taken while a file is opened: so many times its bytes, and what Python keeps free."""


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.__name__)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network: Callable[[], Made] = request.param
    return saved(network, tmp_path_factory.mktemp("networks"))


def peak_bytes() -> int:
    """The largest resident set since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line))


def opened(path: Path) -> Artifact:
    """The file, opened within bounds of time and memory.

    Raises: ArtifactError.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_bytes(), time.process_time()
    try:
        return open_artifact(path)
    finally:
        assert time.process_time() - started < LONGEST_S
        assert peak_bytes() - before < MEMORY * path.stat().st_size + SLACK


def computed(loaded: LoadedExecutable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    arguments = iter(inputs)
    nested = [next(arguments) for _ in loaded.interface.inputs]
    return tensors_of(loaded(*nested))


def check_meaning(path: Path) -> None:
    """Asserts that interpreter and reference compute what the file's graphs say, in float64.

    Raises: ArtifactError where the file cannot be loaded.
    """
    reference = convloom.load(path, "reference")
    interpreter = convloom.load(path, "interpreter")
    generator = torch.Generator().manual_seed(5)
    _, high = reference.programs[-1].batches
    inputs = [
        torch.randn(port.spec.at(high), generator=generator).to(port.spec.dtype)
        for port in reference.interface.inputs
    ]
    for loaded in (reference, interpreter):
        graph = loaded.executables[-1].graph
        dtype, depth = parity.dtype_of(graph), parity.depth_of(graph)
        with torch.no_grad():
            exact, eager = evaluate(graph, inputs, torch.float64), evaluate(graph, inputs)
        results = loaded.executables[-1].plan.structure.results
        values = [graph.outputs()[at] for kind, at in results if kind == "tensor"]
        for got, value in zip(computed(loaded, inputs), values, strict=True):
            told = tolerance.compare(got.to(dtype), exact[value], eager[value].to(dtype), depth)
            assert told is None, f"{loaded.device}: {told}"


def check_texts(artifact: Artifact) -> None:
    """Asserts that a ledger can be shown or is refused."""
    for program in artifact.programs:
        try:
            account = ledger_of(artifact, program).account()
            explain(artifact, program).encode("utf-8", "backslashreplace")
            assert "\x1b" not in picture.to_html(account) + picture.to_svg(account)
        except ConvloomError:
            continue


def without_words(plan: bytes) -> object:
    """plan.json without what the file says of itself, which nothing else says."""
    return {k: v for k, v in json.loads(plan).items() if k not in ("model", "versions", "graphs")}


def check(mutant: Mutant, original: Members, path: Path) -> str:
    """What became of a mutant, in a word, once all that must hold of it does."""
    write_mutant(path, mutant)
    try:
        artifact = opened(path)
    except ArtifactError:
        return "refused"
    changed = mutant.changes(original)
    if "ledger.json" in changed:
        check_texts(artifact)
    if "graph.json" not in changed and "ledger.json" not in changed:
        plans = mutant.members["plan.json"], original["plan.json"]
        # The numbers of weights that the graph names are the graph's to say.
        lies = without_words(plans[0]) != without_words(plans[1]) or "kernels" in changed
        named = rederive.differences(artifact)
        assert named or not rederive.compares_code(artifact) or not lies, "doctor names nothing"
        assert named or changed <= {"plan.json"}, "doctor names nothing"
    try:
        check_meaning(path)
    except ArtifactError:
        return "not loaded"
    return "accepted"


def survey(path: Path, folder: Path, count: int, seed: int) -> Counter[str]:
    """What became of so many mutants; nothing was written beside them, nor where the process is.

    That is a folder of its own: other tests write to the one that pytest was started in.
    """
    mutator, fates, here = Mutator(path, seed), Counter[str](), folder / "here"
    here.mkdir()
    with chdir(here):
        for mutant in islice(mutator, count):
            try:
                fates[check(mutant, mutator.original, folder / "mutant.loom")] += 1
            except Exception as error:
                raise AssertionError(f"{path.stem}: {mutant.what}") from error
    assert sorted(os.listdir(folder)) == ["here", "mutant.loom"] and not os.listdir(here)
    return fates


def test_few_mutants_are_refused_or_mean_what_they_say(path: Path, tmp_path: Path) -> None:
    fates = survey(path, tmp_path, FEW, seed=19)
    assert fates["refused"] and fates["not loaded"] + fates["accepted"]


@pytest.mark.slow
def test_many_mutants_are_refused_or_mean_what_they_say(path: Path, tmp_path: Path) -> None:
    fates = survey(path, tmp_path, MANY, seed=20)
    assert fates["refused"] and fates["not loaded"] and fates["accepted"]
