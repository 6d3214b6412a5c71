"""Executables as files: what comes back, the same bytes for the same network, all or nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import convloom
import pytest
import torch
from convloom.compiler.artifact import archive, graphs, rederive
from convloom.compiler.artifact.graphs import lower_again, read_graph
from convloom.compiler.artifact.read import open_artifact
from convloom.compiler.graph.typed import dump, plain
from convloom.compiler.run.executable import Executable
from convloom.errors import ArtifactError, InvalidInputError, TargetUnavailableError
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import Attributes, Op
from convloom.kernels.devices import offline
from safetensors import safe_open
from torch import nn

from .domains import domain_of
from .nets import make

pytestmark = pytest.mark.interpreter


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def residual(m: Any, x: torch.Tensor) -> dict[str, Any]:
    """Convolution with folded statistics, residual, grouped and depthwise ones; nested outputs."""
    y = torch.relu(m.norm(m.conv(x)))
    z = m.grouped(y) + y
    return {"class": [m.linear(torch.relu(m.deep(z)).mean((2, 3)))], "kept": (z, 3)}


def network(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return make(
        residual,
        (3, 4, 6, 5),
        seed=seed,
        conv=nn.Conv2d(4, 8, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(8),
        grouped=nn.Conv2d(8, 8, 3, padding=1, groups=2),
        deep=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        linear=nn.Linear(8, 5),
    )


def compiled(target: str = "interpreter", **options: Any) -> Executable:
    module, inputs = network()
    options.setdefault("tuning", "heuristic")
    return convloom.compile(module, inputs, target=target, **options)


def small(target: str = "cuda:sm_80") -> Executable:
    """One kernel: for tests that pay for it several times."""
    module, inputs = make(lambda m, x: torch.relu(m.linear(x)), (1, 8), linear=nn.Linear(8, 8))
    return convloom.compile(module, inputs, target=target, tuning="heuristic")


leaves = torch.utils._pytree.tree_leaves


def assert_same(one: Any, other: Any) -> None:
    flat, spec = torch.utils._pytree.tree_flatten(one)
    others, other_spec = torch.utils._pytree.tree_flatten(other)
    assert spec == other_spec
    for left, right in zip(flat, others, strict=True):
        if isinstance(left, torch.Tensor):
            assert left.dtype is right.dtype and torch.equal(left, right)
        else:
            assert left == right


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batches", [None, (1, 4)])
def test_a_loaded_executable_gives_the_same_bits(
    tmp_path: Path, dtype: torch.dtype | None, batches: tuple[int, int] | None
) -> None:
    _, (x,) = network()
    exe = compiled(dtype=dtype, dynamic_batch=batches)
    exe.save(tmp_path / "net.loom")
    loaded = convloom.load(tmp_path / "net.loom")
    assert (loaded.device, loaded.target.name) == ("interpreter", "interpreter")
    for batch in (3, 1) if batches else (3,):
        assert_same(loaded(x[:batch]), exe(x[:batch]))
    assert loaded.summary == exe.summary
    assert loaded.plan.to_text() == exe.plan.to_text()
    assert loaded.executables[0].plan.to_json() == exe.plan.to_json()
    assert loaded.ledger.to_text() == exe.ledger.to_text()
    assert loaded.explain().endswith(exe.ledger.to_text())


@pytest.mark.parametrize("passes", ["none", "default"])
def test_the_reference_is_that_of_the_same_graph(tmp_path: Path, passes: str) -> None:
    _, (x,) = network()
    exe = compiled("reference", passes=passes)
    exe.save(tmp_path / "net.loom")
    loaded = convloom.load(tmp_path / "net.loom")
    assert loaded.device == "reference"
    assert_same(loaded(x), exe(x))
    on_kernels = convloom.load(tmp_path / "net.loom", "interpreter")
    torch.testing.assert_close(on_kernels(x)["kept"][0], exe(x)["kept"][0])


def test_a_file_for_gpus_runs_on_a_cpu(tmp_path: Path) -> None:
    module, (x,) = network()
    exe = compiled("cuda:sm_90", dtype=torch.float16)
    exe.save(tmp_path / "net.loom")
    for device in ("interpreter", "reference"):
        loaded = convloom.load(tmp_path / "net.loom", device)
        torch.testing.assert_close(
            loaded(x)["class"][0], module(x)["class"][0], rtol=0.02, atol=0.02
        )


def test_the_graph_comes_back_as_it_was(tmp_path: Path) -> None:
    """The same nodes in the same order, and so the same plan for any target."""
    options = {"dtype": torch.float16, "forbid": ["epilogue@grouped"]}
    exe = compiled("cuda:sm_90", dynamic_batch=(2, 6), **options)
    exe.save(tmp_path / "net.loom")
    artifact = open_artifact(tmp_path / "net.loom")
    program = artifact.programs[0]
    target = targets.parse("cuda:sm_90")
    graph = read_graph(
        artifact.graphs[0], artifact.programs[0], artifact.tensors, target, "net.loom"
    )
    assert graph.goal == exe.graph.goal
    kept = [name for name in exe.graph.net if name in graph]
    assert [graph.node(name) for name in graph.net] == [exe.graph.node(name) for name in kept]
    assert all(graph.inputs(name) == exe.graph.inputs(name) for name in kept)
    plan = lower_again(graph, program, target, "net.loom")
    assert plan.to_json() == exe.plan.to_json()
    assert rederive.differences(artifact) == []


# The file.


def test_equal_networks_are_equal_bytes(tmp_path: Path) -> None:
    compiled("cuda:sm_90").save(tmp_path / "one", compiled())
    compiled().save(tmp_path / "two", compiled("cuda:sm_90"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


SAVE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from tests.test_artifact import small
if __name__ == "__main__":
    small().save(Path(sys.argv[1]))
"""


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), str(root)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_another_process_with_another_cache_writes_the_same_bytes(tmp_path: Path) -> None:
    caches = {"CONVLOOM_CACHE_DIR": str(tmp_path / "cache"), "PYTHONHASHSEED": "7"}
    started = run_python(SAVE, tmp_path / "other", **caches)
    small().save(tmp_path / "here")
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors
    assert (tmp_path / "other").read_bytes() == (tmp_path / "here").read_bytes()


def test_other_weights_are_other_bytes_of_the_same_plan(tmp_path: Path) -> None:
    for seed in (0, 1):
        module, inputs = network(seed)
        exe = convloom.compile(module, inputs, target="interpreter", tuning="heuristic")
        exe.save(tmp_path / str(seed))
    one, other = (open_artifact(tmp_path / name) for name in ("0", "1"))
    assert one.sha256 != other.sha256
    assert one.programs[0].steps == other.programs[0].steps


def test_the_file_is_a_plain_zip_that_others_can_read(tmp_path: Path) -> None:
    exe = compiled("cuda:sm_90", dtype=torch.float16)
    exe.save(tmp_path / "net.loom")
    with zipfile.ZipFile(tmp_path / "net.loom") as file:
        assert file.testzip() is None
        names = file.namelist()
        assert names == sorted(names)
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        plan = json.loads(file.read("plan.json"))
        file.extract("weights.safetensors", tmp_path)
    assert dict(plan["versions"])["torch"] == torch.__version__
    assert plan["programs"][0]["target"] == "cuda:sm_90"
    with safe_open(tmp_path / "weights.safetensors", "pt") as weights:
        held = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    artifact = open_artifact(tmp_path / "net.loom")
    assert held.keys() == artifact.tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in artifact.tensors.items())


def test_no_path_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    small("cuda:sm_90").save(tmp_path / "net.loom")
    data = (tmp_path / "net.loom").read_bytes()
    root = str(Path(convloom.__file__).parent).encode()
    assert root not in data and os.path.dirname(torch.__file__).encode() not in data


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """A graph's weight is found again in the packed one, whatever the order of its dimensions."""
    module, inputs = make(
        lambda m, x: m.two(torch.relu(m.one(x))),
        (1, 16, 8, 8),
        one=nn.Conv2d(16, 64, 3, bias=False),
        two=nn.Conv2d(64, 64, 3, bias=False),
    )
    exe = convloom.compile(module, inputs, target="interpreter", tuning="heuristic")
    exe.save(tmp_path / "net.loom")
    weights = sum(p.numel() * 4 for p in module.parameters())
    held = open_artifact(tmp_path / "net.loom").tensors.values()
    assert sum(tensor.numel() * tensor.itemsize for tensor in held) == weights


def test_loading_maps_the_weights_and_a_new_file_does_not_change_them(tmp_path: Path) -> None:
    compiled().save(tmp_path / "net.loom")
    artifact = open_artifact(tmp_path / "net.loom")
    before = {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    module, inputs = network(1)
    convloom.compile(module, inputs, target="interpreter").save(tmp_path / "net.loom")
    assert all(torch.equal(before[name], tensor) for name, tensor in artifact.tensors.items())


def test_a_loaded_executable_is_pickled_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(dynamic_batch=(1, 4)).save(tmp_path / "net.loom")
    monkeypatch.chdir(tmp_path)
    loaded = convloom.load("net.loom", "reference")
    data = pickle.dumps(loaded)
    assert len(data) < 500
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    _, (x,) = network()
    assert again.device == "reference"
    assert_same(again(x), loaded(x))


def test_ranges_of_batches_lie_side_by_side(tmp_path: Path) -> None:
    made = [compiled(dynamic_batch=batches) for batches in ((3, 4), (1, 1))]
    made[0].save(tmp_path / "net.loom", made[1])
    loaded = convloom.load(tmp_path / "net.loom")
    _, (x,) = network()
    assert [program.batches for program in loaded.programs] == [(1, 1), (3, 4)]
    assert_same(loaded(x), made[0](x))
    assert_same(loaded(x[:1]), made[1](x[:1]))
    with pytest.raises(InvalidInputError, match=r"compiled for \(1 to 1, 3 to 4\), got 2"):
        loaded(x[:2])


@pytest.mark.parametrize("target", ["interpreter", "reference", "cuda:sm_80"])
@pytest.mark.parametrize("highest", [None, 4])
def test_empty_batches_are_in_the_range_of_a_file(
    tmp_path: Path, target: str, highest: int | None
) -> None:
    """Ranges from 0, and examples without a sample, which stand for the range (0, 1)."""
    module, (x,) = network()
    example, batches = (x, (0, highest)) if highest else (x[:0], None)
    exe = convloom.compile(
        module, (example,), target=target, dynamic_batch=batches, tuning="heuristic"
    )
    exe.save(tmp_path / "net.loom")
    artifact = open_artifact(tmp_path / "net.loom")
    assert [program.batches for program in artifact.programs] == [(0, highest or 1)]
    assert rederive.differences(artifact) == []
    loaded = convloom.load(tmp_path / "net.loom", "interpreter" if exe.target.is_gpu else target)
    with torch.no_grad():
        assert_same(loaded(x[:0]), module(x[:0]))
        full = torch.cat([x, x])[: highest or 1]
        for got, wanted in zip(leaves(loaded(full)), leaves(module(full)), strict=True):
            torch.testing.assert_close(got, wanted)
    with pytest.raises(InvalidInputError, match=f"expected a batch from 0 to {highest or 1}, got"):
        loaded(torch.cat([x, x]))


# What cannot be saved.


def test_torch_fallbacks_are_refused(tmp_path: Path) -> None:
    module, inputs = make(lambda m, x: torch.logcumsumexp(m.conv(x), 1), (1, 3, 4, 4),
                          conv=nn.Conv2d(3, 4, 1))  # fmt: skip
    exe = convloom.compile(module, inputs, target="interpreter", fallback="torch")
    with pytest.raises(ArtifactError, match=r"aten\.logcumsumexp\.default would run as torch ops"):
        exe.save(tmp_path / "net.loom")
    assert not list(tmp_path.iterdir())


def test_executables_of_different_modules_are_refused(tmp_path: Path) -> None:
    other, inputs = make(lambda m, x: m.conv(x), (1, 3, 4, 4), conv=nn.Conv2d(3, 4, 1))
    exe = convloom.compile(other, inputs, target="reference")
    with pytest.raises(ArtifactError, match="its inputs or outputs are not those of program 0"):
        exe.save(tmp_path / "net.loom", compiled())


def test_overlapping_ranges_are_refused(tmp_path: Path) -> None:
    made = [compiled(dynamic_batch=batches) for batches in ((1, 3), (3, 4))]
    with pytest.raises(ArtifactError, match="batches 3 to 4 are there twice"):
        made[0].save(tmp_path / "net.loom", made[1])


def test_a_grid_that_the_file_cannot_say_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convloom.kernels.contract.op import Launch

    exe = compiled("cuda:sm_90", dynamic_batch=(1, 4))
    monkeypatch.setattr(Launch, "grid_at", lambda self, batch: (batch * batch, 1, 1))
    with pytest.raises(ArtifactError, match="and a file can only say"):
        exe.save(tmp_path / "net.loom")


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("global_scratch_size", 128, "global scratch memory"),
        ("profile_scratch_size", 128, "profiling memory"),
        ("tensordesc_meta", [{"swizzle": 3}], "descriptors of its own"),
    ],
)
def test_a_kernel_that_needs_more_than_pointers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, what: str
) -> None:
    compile_request = offline.compile_request

    def changed(wanted: Any) -> Any:
        made = compile_request(wanted)
        metadata = SimpleNamespace(**{**made.metadata._asdict(), field: value})
        return SimpleNamespace(metadata=metadata, asm=made.asm)

    exe = small()
    monkeypatch.setattr(offline, "compile_request", changed)
    with pytest.raises(ArtifactError, match=f"needs {what}, which a file cannot make again"):
        exe.save(tmp_path / "net.loom")


def test_outputs_in_containers_of_their_own_are_refused(tmp_path: Path) -> None:
    """A named tuple would have to be imported by the name that a file says."""
    module, inputs = make(
        lambda m, x: Pair(m.linear(x), torch.relu(x)), (2, 8), linear=nn.Linear(8, 8)
    )
    exe = convloom.compile(module, inputs, target="reference")
    with pytest.raises(ArtifactError, match="nested in Pair; expected tuple, list, or dict"):
        exe.save(tmp_path / "net.loom")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*No such file or directory"):
        compiled("reference").save(tmp_path / "none" / "net.loom")


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailableError, match="expected None, cuda, interpreter, reference"):
        convloom.load(tmp_path / "net.loom", "cpu")


# Crashes.

DIES_WRITING = """
import os, sys, signal
from pathlib import Path
from convloom.compiler.artifact import archive
pieces = iter(range(10_000))

class Content(list):
    def __iter__(self):
        for piece in super().__iter__():
            yield piece
            if next(pieces) == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

member = [bytes([number]) * 1000 for number in range(40)]
archive._size, archive._checksum = lambda c: 40_000, lambda c: 1
archive.write(Path(sys.argv[1]), {"plan.json": Content(member), "graph.json": Content(member)})
"""


@pytest.mark.parametrize("piece", [0, 39, 55])
def test_kill_9_while_saving_leaves_the_old_file(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "net.loom"
    compiled("reference").save(path)
    before = path.read_bytes()
    started = run_python(DIES_WRITING, path, piece)
    started.communicate(timeout=120)
    assert started.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    convloom.load(path)


SAVES_FOR_EVER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.test_artifact import small
exe = small("reference")
print("ready", flush=True)
while True:
    exe.save(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "net.loom"
    small("reference").save(path)
    for delay in (0.0, 0.031):
        started = run_python(SAVES_FOR_EVER, path)
        assert started.stdout is not None and started.stdout.readline() == "ready\n"
        time.sleep(delay)
        started.kill()
        started.wait(timeout=60)
        convloom.load(path)
        assert archive.Archive(path).members


# Many processes, one cache.


def _compile_and_save(path: str) -> None:
    torch.set_num_threads(1)
    small("cuda:sm_86").save(path)


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_four_processes_share_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context(method)
    paths = [tmp_path / f"{number}.loom" for number in range(4)]
    workers = [context.Process(target=_compile_and_save, args=(str(path),)) for path in paths]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len({path.read_bytes() for path in paths}) == 1
    convloom.load(paths[0], "reference")


# Every op.


@pytest.mark.parametrize("op", registry.OPS, ids=lambda op: op.name)
def test_attributes_of_every_op_come_back(op: Op) -> None:
    """New ops are held to it by being in the registry: classes, words and numbers must be known."""
    drawn = random.Random(op.name)
    draws = [*domain_of(op).interesting]
    for _ in range(40):
        ranges = domain_of(op).ranges
        draws.append({name: drawn.choice(list(each)) for name, each in ranges.items()})
    seen = 0
    for draw in draws:
        built = domain_of(op).build(draw)
        if built is None:
            continue
        attributes = built[0]
        data = json.loads(dump(plain(attributes, (Attributes,))))
        assert graphs._GraphReader("test").read(Attributes, data, op.name) == attributes
        seen += 1
    assert seen
