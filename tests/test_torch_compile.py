"""`torch.compile(model, backend="convloom")`."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
import torch._inductor.config
from convloom import zoo
from convloom.benchmarks import foreign
from convloom.compiler.torch_compile import backend
from convloom.errors import InvalidInputError
from torch import nn
from torch._dynamo.backends import registry
from torch._dynamo.exc import BackendCompilerFailed

from . import nets

ROOT = Path(__file__).resolve().parent.parent
IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    """Weights of every kind: in submodules, in a list, as a buffer and as a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.heads = [nn.Linear(8, 5)]
        self.register_buffer("shift", torch.linspace(0.5, 2, 8))
        self.scale = torch.linspace(1, 2, 8)

    def forward(self, x: torch.Tensor, twice: bool = False, *, more: Any = None) -> Any:
        y = self.body(x).mean((2, 3)) * self.scale + self.shift
        if twice:
            y = y * 2
        if more is not None:
            y = y + more["y"]
        return {"scores": self.heads[0](y), "pooled": [y]}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def faster(model: Any, target: str = "reference", dynamic: bool | None = None, **more: Any) -> Any:
    options = {"target": target, **more}
    return torch.compile(model, backend=backend, options=options, dynamic=dynamic)


def network() -> Net:
    model = nets.randomise(Net())
    nets.randomise(model.heads[0], 1)
    return model


def image(batch: int = 2) -> torch.Tensor:
    return nets.inputs_of((batch, *IMAGE[1:]), seed=batch)[0]


def same(got: Any, wanted: Any) -> None:
    for one, other in zip(nets.tensors_of(got), nets.tensors_of(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def made_by(run: Callable[[], Any]) -> list[convloom.Executable]:
    """The executables that are compiled by a call."""
    known = set(convloom.executables())
    run()
    return [each for each in convloom.executables() if each not in known]


def test_the_entry_point_is_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As pip would write it from pyproject.toml; torch.compile finds it without an import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["torch_dynamo_backends"]
    folder = tmp_path / "convloom_backend-0.dist-info"
    folder.mkdir()
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (folder / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{lines}")
    (folder / "METADATA").write_text("Name: convloom-backend\nVersion: 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._lazy_import()
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setattr(registry, "_COMPILER_FNS", dict(registry._COMPILER_FNS))
    registry._discover_entrypoint_backends.__wrapped__()
    assert registry.lookup_backend("convloom") is backend
    model, x = network(), image()
    fast = torch.compile(model, backend="convloom", options={"target": "reference"})
    assert len(made_by(lambda: same(fast(x), model(x)))) == 1


@pytest.mark.interpreter
def test_results_arguments_and_flags_are_the_models_own() -> None:
    model, x, more = network(), image(), {"y": torch.randn(2, 8)}
    fast = faster(model, "interpreter")
    made = made_by(lambda: same(fast(x), model(x)))
    assert fast(x).keys() == {"scores", "pooled"} and isinstance(fast(x)["pooled"], list)
    same(fast(x, True), model(x, True))
    same(fast(twice=True, x=x, more=more), model(x, True, more=more))
    assert len(made) == 1 and made[0].target.name == "interpreter"


def test_the_ledger_speaks_of_the_models_own_modules() -> None:
    model, x = network(), image()

    def function(x: torch.Tensor) -> Any:
        return model(x)["scores"].relu()

    two = nets.randomise(nn.Sequential(nn.Conv2d(3, 4, 3)))

    def both(x: torch.Tensor) -> Any:
        return model.body(x).sum(), two(x)

    (exe,) = made_by(lambda: faster(model)(x))
    paths = {record.module_path for record in exe.ledger.account().nodes}
    assert paths == {"body.0", "body.1", "body.2", "", "heads.0"}
    weights = {node.module_path for node in exe.graph.nodes() if node.op == "constant"}
    assert "heads.0.bias" in weights
    assert "body.0" in {kernel.module_path for kernel in exe.kernels} or exe.kernels == ()
    (exe,) = made_by(lambda: faster(function)(x))
    assert {"body.0", "heads.0"} < {record.module_path for record in exe.ledger.account().nodes}
    assert exe.graph.name == "Net"
    (exe,) = made_by(lambda: faster(both)(x))
    assert {"model.body.0", "two.0"} < {r.module_path for r in exe.ledger.account().nodes}


def test_a_graph_break_makes_two_executables() -> None:
    model, x = network(), image()

    def function(x: torch.Tensor) -> Any:
        y = model.body(x)
        torch._dynamo.graph_break()
        return y.mean((2, 3)), len(y)

    fast = faster(function)
    assert len(made_by(lambda: same(fast(x), function(x)))) == 2
    assert fast(x)[1] == 2


def test_a_batch_that_is_marked_is_a_range() -> None:
    model = network()
    fast = faster(model)
    x = image(4)
    torch._dynamo.mark_dynamic(x, 0)
    (exe,) = made_by(lambda: same(fast(x), model(x)))
    assert exe.plan.batch is not None and exe.plan.batch[0] == 2
    assert made_by(lambda: same(fast(image(3)), model(image(3)))) == []
    largest = exe.plan.batch[1]
    if largest < 15:  # The range grows as larger batches come.
        assert len(made_by(lambda: same(fast(image(15)), model(image(15))))) == 1
    # torch.compile finds out for itself that the batch varies.
    torch.compiler.reset()
    fast(image(2))
    (exe,) = made_by(lambda: fast(image(5)))
    assert exe.plan.batch is not None and exe.plan.batch[0] == 2


def test_the_size_of_the_batch_may_be_used_as_a_number() -> None:
    conv = nets.randomise(nn.Conv2d(3, 4, 3))

    def function(x: torch.Tensor) -> torch.Tensor:
        return conv(x).view(x.shape[0], -1) / x.shape[0]

    fast = faster(function)
    fast(image(2))
    with pytest.warns(UserWarning, match="runs as torch ops:\n  the top module: aten.div"):
        same(fast(image(5)), function(image(5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(fast(image(6)), function(image(6)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_sizes_have_executables_of_their_own(dynamic: bool | None) -> None:
    model = nets.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    fast = faster(model, dynamic=dynamic)
    images = [torch.randn(2, 3, 8 + rows, 9) for rows in range(5)]

    def run(x: torch.Tensor) -> None:
        same(fast(x), model(x))

    made = made_by(lambda: list(map(run, images[:3])))
    assert len(made) == 3 and {each.plan.batch for each in made} == {None}
    assert made_by(lambda: run(images[2])) == []
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(UserWarning, match="it is compiled for . of them already"),
    ):
        run(images[3])
    assert made_by(lambda: list(map(run, images))) == []


def test_numbers_that_torch_compile_makes_tensors_of() -> None:
    def function(x: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.relu(x) * factor

    fast, x = faster(function, dynamic=True), image()
    for factor in (2.0, 3.0, 2.0):
        same(fast(x, factor), function(x, factor))


def test_weights_that_change_are_seen() -> None:
    model, x = network(), image()
    fast = faster(model)
    fast(x)
    model.body[0].weight.mul_(2)
    same(fast(x), model(x))
    model.scale = model.scale * 3
    same(fast(x), model(x))
    model.body[1].running_mean.data = torch.ones(8)
    same(fast(x), model(x))
    model.load_state_dict(nets.randomise(Net(), 3).state_dict())
    assert len(made_by(lambda: same(fast(x), model(x)))) == 1
    assert made_by(lambda: fast(x)) == []


@torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True)
def test_weights_that_change_are_seen_by_the_fast_guards_too() -> None:
    """Those that docs/benchmarks.md recommends."""
    model = nets.randomise(nn.Sequential(nn.Conv2d(3, 4, 3)))
    fast, x, conv = faster(model), image(), model[0]
    fast(x)
    conv.weight.mul_(2)
    same(fast(x), model(x))
    conv.weight = nn.Parameter(conv.weight + 1)
    same(fast(x), model(x))
    conv.bias.data = torch.ones(4)
    same(fast(x), model(x))
    conv.stride = (2, 2)
    same(fast(x), model(x))


@pytest.mark.parametrize("config", [torch._inductor.config, torch._dynamo.config])
def test_weights_that_the_graph_holds_itself_are_seen_to_change(config: Any) -> None:
    """TorchDynamo does not pass them to each call under these settings."""
    name = "freezing" if config is torch._inductor.config else "prepare_freezing"
    with config.patch({name: True}):
        model, x = network(), image()
        fast = faster(model)
        (exe,) = made_by(lambda: same(fast(x), model(x)))
        weights = {node.module_path for node in exe.graph.nodes() if node.op == "constant"}
        assert "heads.0.bias" in weights
        model.body[0].weight.mul_(2)
        same(fast(x), model(x))
        model.body[1].running_mean.data = torch.ones(8)
        assert len(made_by(lambda: same(fast(x), model(x)))) == 1
        assert made_by(lambda: fast(x)) == []
        model.train()
        with pytest.warns(UserWarning, match="it writes its input .*num_batches_tracked"):
            fast(x)


def test_weights_that_are_promised_to_stay_are_not_looked_at() -> None:
    model, x = network(), image()
    fast = faster(model, check_weights=False)
    before = fast(x)
    model.body[0].weight.mul_(2)
    same(fast(x), before)
    same(fast(image(3)), model(image(3)))  # Another executable takes what they are now.
    torch.compiler.reset()
    same(fast(x), model(x))


def test_modules_that_are_promised_to_stay_are_not_looked_at() -> None:
    """By torch's own option, as docs/torch_compile.md recommends: no guard is left on a module."""
    model, x = nets.randomise(nn.Sequential(nn.Conv2d(3, 4, 3))), image()
    trusting = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    fast = faster(model, check_weights=False, guard_filter_fn=trusting)
    before = fast(x)
    same(before, model(x))
    model[0].stride = (2, 2)
    model[0].weight = nn.Parameter(model[0].weight + 1)
    assert made_by(lambda: same(fast(x), before)) == []
    same(fast(image(3)), model(image(3)))  # Traced again for another size, as all is now.
    fast = faster(model, guard_filter_fn=trusting)
    fast(x)
    model[0].bias.mul_(2)
    same(fast(x), model(x))  # Weights are looked at by the backend.


def test_gradients_are_left_to_torch() -> None:
    model, x = network(), image()
    fast = faster(model)
    with torch.enable_grad(), pytest.warns(UserWarning, match=r"call it under torch\.no_grad\(\)"):
        fast(x)["scores"].sum().backward()
        assert model.body[0].weight.grad is not None
        assert len(made_by(lambda: same(torch.no_grad()(fast)(x), model(x)))) == 1
    with torch.enable_grad():
        assert len(made_by(lambda: faster(torch.no_grad()(lambda x: model(x)))(x))) == 1
        frozen = faster(model.requires_grad_(False).heads[0].requires_grad_(False))
        assert len(made_by(lambda: frozen(torch.randn(2, 8)))) == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_regions_without_gradients(mode: Any) -> None:
    model, x = network(), image()
    with mode():
        assert len(made_by(lambda: same(faster(model)(x.clone()), model(x)))) == 1


def test_autocast_is_honoured() -> None:
    model, x = network().body, image()

    def inside(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return y.float() * 2

    (exe,) = made_by(lambda: faster(inside)(x))
    assert torch.bfloat16 in {node.spec.dtype for node in exe.graph.nodes() if node.outputs}
    torch.testing.assert_close(faster(inside)(x), inside(x), rtol=0.02, atol=0.02)
    fast = faster(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype is torch.bfloat16
    same(fast(x), model(x))


def test_what_writes_or_returns_its_inputs_is_left_to_torch() -> None:
    conv, x = nets.randomise(nn.Conv2d(3, 4, 3)), image()

    def writes(x: torch.Tensor) -> torch.Tensor:
        return conv(x.mul_(2))

    def views(x: torch.Tensor) -> Any:
        y = conv(x)
        return y, x[0], y.flatten(1)

    ours, theirs = x.clone(), x.clone()
    with pytest.warns(UserWarning, match=r"it writes its input L\['x'\]"):
        same(faster(writes)(ours), writes(theirs))
    assert torch.equal(ours, theirs) and not torch.equal(ours, x)
    with pytest.warns(UserWarning, match="a result is a view of an input, or of another result"):
        _, part, _ = faster(views)(ours)
    part.zero_()
    assert not ours[0].any()


def test_what_has_no_kernel_runs_as_a_torch_op() -> None:
    conv, x = nets.randomise(nn.Conv2d(3, 4, 3)), image()

    def odd(x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(torch.tanh(conv(x)))

    with pytest.warns(UserWarning, match=r"aten.erfinv.default.*no kernel for this op"):
        (exe,) = made_by(lambda: same(faster(odd)(x), odd(x)))
    assert exe.summary["torch_fallbacks"] == 1
    with pytest.raises(BackendCompilerFailed, match="UnsupportedOpError: Conv2d has 1 op without"):
        faster(odd, fallback="error")(x)

    def counts(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return conv(x) + n

    n = torch.arange(6)
    with pytest.warns(UserWarning, match="runs as torch ops: example input 1: expected float32"):
        same(faster(counts)(x, n), counts(x, n))
    with pytest.raises(BackendCompilerFailed, match="CaptureError: example input 1: expected"):
        faster(counts, fallback="error")(x, n)


def test_training_is_left_to_torch() -> None:
    model, x = network().train(), image()
    before = model.body[1].running_mean.clone()
    with pytest.warns(UserWarning, match="runs as torch ops"):
        faster(model)(x)
    assert not torch.equal(model.body[1].running_mean, before)


def test_weights_without_version_counters_are_left_to_torch() -> None:
    with torch.inference_mode():
        model, x = network().body, image()
        with pytest.warns(UserWarning, match="was made under torch.inference_mode"):
            same(faster(model)(x), model(x))


def test_options_are_those_of_compile() -> None:
    model, x = network(), image()
    (exe,) = made_by(
        lambda: faster(model, dtype=torch.float16, passes="none", tuning="heuristic")(x)
    )
    assert torch.float16 in {node.spec.dtype for node in exe.graph.nodes() if node.outputs}
    assert all(not node.rules for node in exe.graph.nodes())
    module = torch.fx.symbolic_trace(nn.ReLU())
    for options, message in (
        ({"targt": "reference"}, "options: backend 'convloom' has no 'targt'; did you mean target"),
        ({"outputs": ["x"]}, "options: backend 'convloom' has no 'outputs'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            backend(module, [], options=options)
    with pytest.raises(InvalidInputError, match="mode: backend 'convloom' has none, got 'max"):
        backend(module, [], mode="max-autotune")
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match="TargetUnavailableError"):
        faster(model, "cuda:sm_12")(x)
    with pytest.raises(BackendCompilerFailed, match="precision: expected one of ieee, tf32"):
        faster(model, precision="high")(x)


@pytest.mark.interpreter
def test_a_model_of_the_zoo() -> None:
    model = nets.randomise(zoo.lenet5())
    x = torch.rand(2, 1, 32, 32)
    (exe,) = made_by(lambda: same(faster(model, "interpreter")(x), model(x)))
    direct = convloom.compile(model, (x,), target="interpreter")
    assert exe.summary == direct.summary and exe.plan.to_text() == direct.plan.to_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v2", "densenet121"])
def test_whole_networks(name: str) -> None:
    model = nets.randomise(zoo.build(name))
    x = torch.randn(1, *zoo.entry(name).input_shape)
    (exe,) = made_by(lambda: nets.check(faster(model)(x), model, (x,)))
    direct = convloom.compile(model, (x,), target="reference")
    assert exe.summary == direct.summary


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/seresnet50"])
def test_networks_of_others(name: str) -> None:
    try:
        model = foreign.build(name)
    except ImportError as error:
        pytest.skip(f"needs torchvision and timm: {error}")
    x = foreign.fitting_input(model)
    (exe,) = made_by(lambda: same(faster(model)(x), model(x)))
    assert exe.summary["torch_fallbacks"] == 0
