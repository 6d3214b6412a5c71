"""Capture: what the graph keeps of the module, what is refused, what stays untouched."""

from __future__ import annotations

import copy
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.capture.capture import capture, refuse_unsupported
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import CONSTANT, TORCH, Graph
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes.recognise import recognise_composites
from convloom.errors import CaptureError, UnsupportedOpError
from torch import nn

from . import nets
from .nets import IMAGE, Made, make


def conv(r: int = 3, k: int = 6, c: int = 6) -> nn.Conv2d:
    return nn.Conv2d(c, k, r, padding=r // 2)


def count(graph: Graph, op: str) -> int:
    return sum(node.op == op for node in graph.nodes())


def captured(made: Made, batch: tuple[int, int] | None = None) -> Graph:
    graph = nets.captured(*made, batch)
    verify(graph)
    return graph


# Paths and sharing.


def test_module_paths_are_those_of_the_submodules() -> None:
    block = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())
    graph = captured(make(lambda m, x: m.layer(x) + 1.0, IMAGE, layer=block))
    paths = [(node.op, node.module_path) for node in graph.compute_nodes() if node.op != "reshape"]
    assert paths == [
        ("conv2d", "layer.0"),
        ("batch_norm", "layer.1"),
        ("relu", "layer.2"),
        ("add", ""),
    ]
    weights = {node.module_path for node in graph.nodes() if node.op == CONSTANT}
    assert "layer.0.weight" in weights and "layer.1.running_var" in weights


def test_a_module_called_twice_has_one_weight() -> None:
    graph = captured(make(lambda m, x: m.conv(m.conv(x)), IMAGE, conv=conv()))
    assert count(graph, "conv2d") == 2
    assert count(graph, CONSTANT) == 2, "one weight and one bias"


@pytest.mark.interpreter
def test_tied_weights_are_one_constant() -> None:
    module, inputs = make(lambda m, x: m.a(x) + m.b(x).relu(), (3, 8), a=linear(), b=linear())
    module.b.weight = module.a.weight
    graph = captured((module, inputs))
    assert count(graph, CONSTANT) == 3, "one weight and two biases"
    assert len({graph.own_inputs(node)[1] for node in graph.nodes() if node.op == "linear"}) == 1
    nets.check(convloom.compile(module, inputs, target="interpreter")(*inputs), module, inputs)


def linear(features: int = 8, results: int = 8) -> nn.Linear:
    return nn.Linear(features, results)


def test_equal_but_separate_weights_stay_separate() -> None:
    module, inputs = make(lambda m, x: m.a(x) + m.b(x), (3, 8), a=linear(), b=linear())
    module.b.load_state_dict(module.a.state_dict())
    assert count(captured((module, inputs)), CONSTANT) == 4


# Arguments and results.


class Keywords(nn.Module):
    """Takes a nested argument and returns a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, pair: dict[str, torch.Tensor], scale: torch.Tensor) -> Any:
        y = self.conv(pair["x"]) * scale
        return {"y": y, "both": (y + pair["r"], None), "count": 3, "again": [y, pair["x"]]}


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", [None, (1, 4)])
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_nested_arguments_and_results(target: str, batch: tuple[int, int] | None) -> None:
    module = nets.randomise(Keywords())
    x, r, scale = nets.inputs_of(IMAGE, IMAGE, (2, 1, 1, 1))
    exe = convloom.compile(module, ({"x": x, "r": r}, scale), target=target, dynamic_batch=batch)
    got = exe({"x": x, "r": r}, scale)
    with torch.no_grad():
        want = module({"x": x, "r": r}, scale)
    assert got.keys() == want.keys() and got["count"] == 3 and got["both"][1] is None
    assert type(got["both"]) is tuple and type(got["again"]) is list
    for ours, theirs in zip(nets.tensors_of(got), nets.tensors_of(want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(got["again"][1], x)


@pytest.mark.interpreter
def test_what_is_returned_may_be_an_input_a_weight_or_one_value_twice() -> None:
    module, inputs = make(
        lambda m, x: (x, m.conv.weight, m.conv.weight * 2.0, x.relu(), x.relu()),
        IMAGE,
        conv=conv(),
    )
    exe = convloom.compile(module, inputs, target="interpreter")
    nets.check(exe(*inputs), module, inputs)


class WritesItsInput(nn.Module):
    def forward(self, x: torch.Tensor, r: torch.Tensor) -> Any:
        torch.relu_(x)
        return {"sum": x + r.mul_(2.0), "x": x}


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_a_module_that_writes_its_inputs_leaves_them_alone(target: str) -> None:
    inputs = nets.inputs_of((2, 3), (2, 3))
    kept = [x.clone() for x in inputs]
    exe = convloom.compile(WritesItsInput(), inputs, target=target)
    got = exe(*inputs)
    assert all(map(torch.equal, inputs, kept))
    want = WritesItsInput()(*kept)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.interpreter
def test_inputs_that_are_not_used_still_count() -> None:
    module, inputs = make(lambda m, x, unused, r: x - r, (2, 3), (5, 5), (2, 3))
    exe = convloom.compile(module, inputs, target="interpreter")
    assert torch.equal(exe(*inputs), inputs[0] - inputs[2])


def test_a_result_without_tensors_is_refused() -> None:
    with pytest.raises(CaptureError, match="returns no tensor"):
        capture(*make(lambda m, x: 3, IMAGE))


# Batches.


def several_batches() -> Made:
    def function(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        y = torch.cat([m.norm(m.conv(x)), r], 1).relu()
        pooled = F.adaptive_avg_pool2d(y, 2) + F.adaptive_max_pool2d(y, 2)
        return m.head(torch.flatten(pooled, 1)), y

    return make(
        function,
        IMAGE,
        (2, 2, 7, 5),
        conv=conv(),
        norm=nn.BatchNorm2d(6),
        head=nn.Linear(32, 3),
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_one_plan_serves_every_batch_of_the_range(target: str) -> None:
    module, inputs = several_batches()
    exe = convloom.compile(module, inputs, target=target, dynamic_batch=(1, 8))
    for batch in (8, 1, 2, 5, 8):
        x, r = nets.inputs_of((batch, 6, 7, 5), (batch, 2, 7, 5), seed=batch)
        nets.check(exe(x, r), module, (x, r))
    for batch in (9, 0):
        x, r = nets.inputs_of((batch, 6, 7, 5), (batch, 2, 7, 5))
        with pytest.raises(convloom.InvalidInputError, match=r"a batch from 1 to 8"):
            exe(x, r)


@pytest.mark.interpreter
@pytest.mark.parametrize("bounds", [(1, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize("offered", [1, 2, 4])
def test_any_example_batch_serves_any_range(offered: int, bounds: tuple[int, int]) -> None:
    module, inputs = make(lambda m, x: m.head(x).relu(), (offered, 8), head=linear())
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=bounds)
    for batch in sorted(set(bounds)):
        (x,) = nets.inputs_of((batch, 8))
        nets.check(exe(x), module, (x,))


def test_specs_are_those_of_the_largest_batch() -> None:
    graph = captured(several_batches(), (1, 8))
    shapes = {node.op: (node.spec.batch, *node.spec.shape) for node in graph.compute_nodes()}
    assert shapes["conv2d"] == shapes["batch_norm"] == (8, 8, 6, 7, 5)
    assert shapes["concat"] == (8, 8, 8, 7, 5)
    assert shapes["linear"] == (8, 8, 3)
    assert [node.spec.shape[0] for node in graph.graph_inputs()] == [8, 8]


def test_static_graphs_have_no_batch() -> None:
    graph = captured(several_batches())
    assert all(spec.batch is None for node in graph.nodes() for spec in node.outputs)


def test_batches_that_differ_between_inputs_are_refused() -> None:
    module, inputs = several_batches()
    exe = convloom.compile(module, inputs, target="reference", dynamic_batch=(1, 8))
    x, r = nets.inputs_of((3, 6, 7, 5), (2, 2, 7, 5))
    with pytest.raises(convloom.InvalidInputError, match=r"expected equal batches, got \[2, 3\]"):
        exe(x, r)


class DependsOnBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0 if x.shape[0] == 2 else x


class MovesBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).relu()


def test_code_that_depends_on_the_batch_is_refused() -> None:
    module = DependsOnBatch()
    assert captured((module, nets.inputs_of((2, 3)))), "a static batch is fine"
    with pytest.raises(CaptureError, match="batch"):
        capture(module, nets.inputs_of((2, 3)), (1, 8))


def test_results_whose_batch_is_elsewhere_are_refused() -> None:
    module = MovesBatch()
    assert captured((module, nets.inputs_of((2, 3)))), "a static batch is fine"
    refusal = r"^output 0: .* in dimension 1 of \(3, 8\)\. Move it there before it is returned"
    with pytest.raises(UnsupportedOpError, match=refusal):
        capture(module, nets.inputs_of((2, 3)), (1, 8))


# Nothing changes.


@pytest.mark.parametrize("dynamic", [None, (1, 4)])
def test_capture_changes_nothing(dynamic: tuple[int, int] | None) -> None:
    module, inputs = several_batches()
    module.train()
    module.norm.eval()
    module.conv.weight.grad = torch.ones_like(module.conv.weight)
    state = copy.deepcopy(module.state_dict())
    flags = {name: layer.training for name, layer in module.named_modules()}
    names = [name for name, _ in module.named_parameters()]
    pointers = [parameter.data_ptr() for parameter in module.parameters()]
    copies = [x.clone() for x in inputs]
    versions = [x._version for x in inputs]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    grad = torch.is_grad_enabled()

    convloom.compile(module, inputs, target="reference", dynamic_batch=dynamic)(*inputs)

    assert all(torch.equal(old, module.state_dict()[name]) for name, old in state.items())
    assert list(module.state_dict()) == list(state)
    assert flags == {name: layer.training for name, layer in module.named_modules()}
    assert names == [name for name, _ in module.named_parameters()]
    assert pointers == [parameter.data_ptr() for parameter in module.parameters()]
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(module.conv.weight.grad, torch.ones_like(module.conv.weight))
    assert all(torch.equal(x, kept) for x, kept in zip(inputs, copies, strict=True))
    assert versions == [x._version for x in inputs]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() is grad


def test_a_refused_training_module_is_left_alone() -> None:
    module, inputs = make(lambda m, x: m.norm(x), IMAGE, norm=nn.BatchNorm2d(6))
    module.train()
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(CaptureError):
        capture(module, inputs)
    assert all(torch.equal(old, module.state_dict()[name]) for name, old in state.items())
    assert module.training and module.norm.training


# Training modules.


TRAINING = {
    "batch_norm": ("layer.0", nn.BatchNorm2d(6), True),
    "dropout": ("layer.0", nn.Dropout(0.5), True),
    "dropout2d": ("layer.0", nn.Dropout2d(0.5), True),
    "rrelu": ("layer.0", nn.RReLU(), True),
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_module_that_would_train_is_refused(name: str) -> None:
    path, layer, flag = TRAINING[name]
    layer = copy.deepcopy(layer)
    module, inputs = make(lambda m, x: m.layer(x), IMAGE, layer=nn.Sequential(layer))
    layer.train(flag)
    with pytest.raises(CaptureError) as caught:
        capture(module, inputs)
    message = str(caught.value)
    assert "would still train" in message and ".eval()" in message
    assert f"{path} (" in message, "the message names the layer"


def test_every_training_layer_is_named() -> None:
    module, inputs = make(
        lambda m, x: m.b(m.norm(m.a(x))),
        IMAGE,
        a=nn.Dropout(),
        norm=nn.BatchNorm2d(6),
        b=nn.Dropout(),
    )
    module.train()
    with pytest.raises(CaptureError) as caught:
        capture(module, inputs)
    assert all(f"{path} (" in str(caught.value) for path in ("a", "norm", "b"))


def test_functional_dropout_that_ignores_eval_is_refused() -> None:
    module, inputs = make(lambda m, x: F.dropout(x, 0.5, training=True), IMAGE)
    with pytest.raises(CaptureError, match=r"in evaluation mode: the module: aten.*dropout"):
        capture(module, inputs)


def test_a_training_flag_without_effect_is_not_refused() -> None:
    module, inputs = make(lambda m, x: m.norm(m.conv(x)), IMAGE, conv=conv(), norm=frozen_norm())
    module.train()
    module.norm.eval()
    assert count(captured((module, inputs)), "batch_norm") == 1


def frozen_norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(6)


@pytest.mark.interpreter
def test_dropout_in_evaluation_is_nothing() -> None:
    module, inputs = make(
        lambda m, x: m.b(m.conv(m.a(x))), IMAGE, a=nn.Dropout2d(), conv=conv(), b=nn.Dropout()
    )
    exe = convloom.compile(module, inputs, target="interpreter")
    assert [step.op for step in exe.plan.steps] == ["relayout", "conv2d", "relayout"]
    dropped = [node for node in exe.ledger.account().nodes if node.module_path == "b"]
    assert [(node.op, node.kernel) for node in dropped] == [("identity", "removed")]
    nets.check(exe(*inputs), module, inputs)


def test_batch_norm_over_the_batch_is_not_training_but_needs_a_fixed_one() -> None:
    module, inputs = make(
        lambda m, x: m.norm(x), IMAGE, norm=nn.BatchNorm2d(6, track_running_stats=False)
    )
    exe = convloom.compile(module, inputs, target="reference")
    assert [step.op for step in exe.plan.steps] == ["relayout", "normalize", "relayout"]
    with pytest.raises(UnsupportedOpError, match="need a batch of fixed size"):
        convloom.compile(module, inputs, target="reference", dynamic_batch=(1, 4))


# Unsupported nodes.


class Inverse(nn.Module):
    """A layer that has no kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(x.clamp(-0.5, 0.5))


class Unsupported(nn.Module):
    """Two calls without a kernel, one of them inside a submodule, between calls that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.odd = nn.Sequential(Inverse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.logcumsumexp(self.conv(x), 1)
        return self.odd(y).relu()


@pytest.mark.parametrize("batch", [None, (1, 4)])
@pytest.mark.parametrize("target", ["reference", "interpreter", "cuda:sm_90"])
def test_all_unsupported_nodes_are_reported_at_once(
    target: str, batch: tuple[int, int] | None
) -> None:
    module, inputs = nets.randomise(Unsupported()), nets.inputs_of(IMAGE)
    with pytest.raises(UnsupportedOpError) as caught:
        convloom.compile(module, inputs, target=target, dynamic_batch=batch)
    message = str(caught.value)
    n = "N" if batch else "2"
    assert "has 2 ops without a kernel:" in message
    assert f"the top module: aten.logcumsumexp.default(float32[{n}, 6, 7, 5]" in message
    assert f"'odd.0': aten.erfinv.default(float32[{n}, 6, 7, 5]" in message
    assert "To run them by torch" in message and "hardsigmoid" not in message


def test_refused_arguments_say_why() -> None:
    module, inputs = make(lambda m, x: x.roll(2), IMAGE)
    with pytest.raises(UnsupportedOpError, match="roll of the flattened tensor; pass dims"):
        convloom.compile(module, inputs, target="reference")


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", [None, (1, 4)])
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_fallback_runs_unsupported_nodes_as_torch_ops(
    target: str, batch: tuple[int, int] | None
) -> None:
    module, inputs = nets.randomise(Unsupported()), nets.inputs_of(IMAGE)
    exe = convloom.compile(module, inputs, target=target, dynamic_batch=batch, fallback="torch")
    for size in (2, 3) if batch else (2,):
        (x,) = nets.inputs_of((size, *IMAGE[1:]), seed=size)
        nets.check(exe(x), module, (x,))
    assert exe.summary["torch_fallbacks"] == 2
    assert "; 2 torch fallbacks" in exe.summary_line()
    account = exe.ledger.account()
    fallbacks = {place.name for place in account.places if place.what == "torch"}
    by_torch = {record.op: record for record in account.nodes if record.kernel in fallbacks}
    assert by_torch.keys() == {"aten.logcumsumexp.default", "aten.erfinv.default"}
    assert by_torch["aten.erfinv.default"].module_path == "odd.0"


@pytest.mark.interpreter
def test_fallback_with_several_results_and_half_precision() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        values, _ = torch.cummax(m.conv(x), 1)
        first, second = torch.var_mean(values, (2, 3))
        return first + second, values

    module, inputs = make(function, IMAGE, conv=conv())
    exe = convloom.compile(
        module, inputs, target="interpreter", dtype=torch.bfloat16, fallback="torch"
    )
    nets.check(exe(*inputs), module, inputs, torch.bfloat16)
    assert exe.summary["torch_fallbacks"] == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_fallback_with_whole_numbers(target: str) -> None:
    module, inputs = make(lambda m, x: (m.conv(x).argmax(1), x.relu()), IMAGE, conv=conv())
    exe = convloom.compile(module, inputs, target=target, fallback="torch")
    classes, _ = exe(*inputs)
    with torch.no_grad():
        assert torch.equal(classes, module(*inputs)[0])
    assert classes.dtype is torch.int64


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_a_computed_weight_needs_the_fallback(target: str) -> None:
    def function(m: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, w.abs(), w.abs()).relu()

    module, inputs = make(function, (2, 3, 5, 6), (3,))
    with pytest.raises(UnsupportedOpError, match="input 1 of batch_norm is computed"):
        convloom.compile(module, inputs, target=target)
    exe = convloom.compile(module, inputs, target=target, fallback="torch")
    nets.check(exe(*inputs), module, inputs)
    assert exe.summary["torch_fallbacks"] == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_calls_on_parameters_alone_need_no_kernel(target: str) -> None:
    """A weight made orthonormal, and standardised as weight-standardised convolutions do, in the
    graph; and a matrix that follows from nothing."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        square = torch.linalg.qr(m.conv.weight.flatten(1))[0] + torch.eye(6)
        flat = m.last.weight.reshape(1, 4, -1)
        standard = F.batch_norm(flat, None, None, training=True).reshape(4, 6, 3, 3)
        return F.conv2d(F.conv2d(x, square[:, :, None, None]).relu(), standard, m.last.bias)

    module, inputs = make(function, IMAGE, conv=conv(1), last=nn.Conv2d(6, 4, 3))
    exe = convloom.compile(module, inputs, target=target)
    assert exe.summary["torch_fallbacks"] == 0 and exe.summary["convs"] == 2
    nets.check(exe(*inputs), module, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_whole_numbers_that_follow_from_parameters(target: str) -> None:
    """Stay whole numbers: a call that stays a torch call picks channels by them, and a kernel."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        places = m.conv.bias.argsort()
        return m.conv(x)[:, places].index_fill(1, places[:2], 0.5).relu()

    module, inputs = make(function, IMAGE, conv=conv())
    exe = convloom.compile(module, inputs, target=target, fallback="torch")
    assert exe.summary["torch_fallbacks"] == 1
    nets.check(exe(*inputs), module, inputs)


@pytest.mark.interpreter
def test_fallback_that_is_not_needed_changes_nothing() -> None:
    module, inputs = make(lambda m, x: m.conv(x), IMAGE, conv=conv())
    exe = convloom.compile(module, inputs, target="interpreter", fallback="torch")
    assert exe.summary["torch_fallbacks"] == 0
    nets.check(exe(*inputs), module, inputs)


# Composite ops.

COMPOSITES = {
    "local_response_norm": lambda m, x: F.local_response_norm(x, 5, 1e-2, 0.75, 2.0),
    "local_response_norm 4": lambda m, x: F.local_response_norm(x, 4, 1e-2, 0.5, 1.0),
    "lp_pool2d": lambda m, x: F.lp_pool2d(x.abs(), 3.0, 2),
    "lp_pool2d 2": lambda m, x: F.lp_pool2d(x, 2.0, (2, 3), stride=1),
    "clamp": lambda m, x: F.relu6(4.0 * x),
    "clamp hardtanh": lambda m, x: F.hardtanh(4.0 * x, 0.0, 6.0),
    "clamp clip": lambda m, x: torch.clamp(4.0 * x, 0.0, 6.0),
    "silu": lambda m, x: x * torch.sigmoid(x),
    "silu reversed": lambda m, x: torch.sigmoid(x) * x,
    "hardswish": lambda m, x: x * F.hardsigmoid(x),
    "mish": lambda m, x: x * torch.tanh(F.softplus(x)),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", [None, (1, 3)], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_are_recognised(name: str, batch: tuple[int, int] | None) -> None:
    module, inputs = make(COMPOSITES[name], IMAGE)
    graph = recognise_composites(captured((module, inputs), batch), Ledger())
    verify(graph)
    op = name.partition(" ")[0]
    assert count(graph, op) == 1, text.to_text(graph)
    assert count(graph, TORCH) == 0
    refuse_unsupported(graph)
    with nets.exporting_once():
        exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=batch)
    for size in (1, 3) if batch else (2,):
        (x,) = nets.inputs_of((size, *IMAGE[1:]), seed=size)
        nets.check(exe(x), module, (x,))


LOOKALIKES = {
    "sum, not mean": lambda m, x: F.avg_pool2d(x.square(), 2).abs().relu().sqrt(),
    "other tensor": lambda m, x: x * torch.sigmoid(x + 1.0),
    "softplus beta": lambda m, x: x * torch.tanh(F.softplus(x, beta=2.0)),
    "square root kept": lambda m, x: (lambda g: x * g + g)(torch.sigmoid(x)),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_left_alone(name: str) -> None:
    module, inputs = make(LOOKALIKES[name], IMAGE)
    before = captured((module, inputs))
    after = recognise_composites(before.copy(), Ledger())
    assert text.to_text(after) == text.to_text(before)
    nets.check(convloom.compile(module, inputs, target="interpreter")(*inputs), module, inputs)


def test_views_are_captured_as_tensors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export is told of shapes only; an example larger than its memory stays as it is."""
    seen: list[torch.Tensor] = []
    real = torch.export.export

    def export(module: Any, arguments: Any, keywords: Any, **options: Any) -> Any:
        seen.extend(arguments)
        return real(module, arguments, keywords, **options)

    monkeypatch.setattr(torch.export, "export", export)
    whole = torch.zeros(3, 2, 6, 7)
    plain, expanded = torch.zeros(2, 7, 6), torch.zeros(1).expand(2, 7, 6)
    for view in (whole[1], plain, plain.transpose(1, 2), expanded, whole[1, :, :, 1::2]):
        capture(nn.ReLU(), (view,))
        (got,) = seen
        assert got.shape == view.shape
        assert (got is view) == (view is plain or view is expanded)
        assert got is view or (got.is_contiguous() and not got._is_view())
        seen.clear()
