"""The graph itself: its laws, how it is changed, copied and printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networkx as nx
import pytest
import torch
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import CONSTANT, INPUT, OUTPUT, Graph, NoAttributes, Node, Value
from convloom.compiler.graph.verify import verify, verify_memory
from convloom.errors import GraphError, InvalidInputError, UnsupportedOpError
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.movement.movement import Concat, Slice
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import given
from hypothesis import strategies as st


def source(shape: tuple[int, ...], name: str = "x", batch: int | None = None) -> Node:
    return Node(name, INPUT, NoAttributes(), (TensorSpec(shape, torch.float32, batch=batch),))


def small() -> Graph:
    """y = relu(conv2d(x, w) + r), fused, and cat(y, y)[:, 1:5] returned beside r."""
    graph = Graph(name="small")
    x, r = graph.insert(source((2, 3, 4, 4))), graph.insert(source((2, 4, 4, 4), "r"))
    w = graph.add_constant(torch.ones(4, 3, 3, 3), "w", torch.float32)
    stages = (Stage("add"), Stage("relu"))
    y = graph.add("conv2d", (x, w, r), Conv2d(padding=(1, 1, 1, 1)), epilogue=stages, name="y")
    graph.update("y", module_path="block.conv")
    joined = graph.add("concat", (y, y), Concat(1), name="joined")
    cut = graph.add("slice", (joined,), Slice(1, 1, 5), name="cut")
    graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), (cut, r))
    return graph


def test_a_sound_graph_is_accepted() -> None:
    verify(small())


@given(edges=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 3))))
def test_nodes_are_in_the_order_of_networkx(edges: list[tuple[int, int, int]]) -> None:
    """Names are inserted in another order than that of their edges; some edges are there twice."""
    graph = Graph()
    inserted = [f"n{at}" for at in (3, 0, 6, 1, 7, 2, 5, 4)]
    for name in inserted:
        graph.insert(source((1,), name))
    for first, second, slot in edges:
        if first < second:
            graph.net.add_edge(f"n{first}", f"n{second}", key=slot, index=0)
    order = nx.lexicographical_topological_sort(graph.net, key=inserted.index)
    assert [node.name for node in graph.nodes()] == list(order)


# Laws, one by one.


def make_cycle(graph: Graph) -> None:
    graph.set_inputs("y", (*graph.inputs("y")[:2], Value("cut")))


def remove_output(graph: Graph) -> None:
    graph.remove([OUTPUT])


def add_second_output(graph: Graph) -> None:
    graph.insert(Node("again", OUTPUT, NoAttributes(), ()), (Value("y"),))


def leave_a_gap(graph: Graph) -> None:
    graph.net.remove_edge("y", "joined", key=0)


def read_a_missing_result(graph: Graph) -> None:
    graph.set_inputs("cut", (Value("joined", 1),))


def feed_an_input(graph: Graph) -> None:
    graph.set_inputs("r", (Value("x"),))


def lose_a_tensor(graph: Graph) -> None:
    graph.tensors.pop("w_1")


def resize_a_tensor(graph: Graph) -> None:
    graph.tensors["w_1"] = torch.ones(4, 3, 3, 1)


def keep_a_stray_tensor(graph: Graph) -> None:
    graph.tensors["stray"] = torch.ones(1)


def mistake_attributes(graph: Graph) -> None:
    graph.update("cut", attributes=Pointwise())


def read_too_little(graph: Graph) -> None:
    graph.update("y", epilogue=(Stage("add"),) * 4)


def fuse_into_concat(graph: Graph) -> None:
    graph.update("joined", epilogue=(Stage("relu"),))


def sink_into_concat(graph: Graph) -> None:
    graph.update("joined", prologue=(Stage("relu"),))


def mistake_a_shape(graph: Graph) -> None:
    graph.update("cut", outputs=(TensorSpec((2, 5, 4, 4), torch.float32),))


def mistake_the_batch(graph: Graph) -> None:
    graph.update("cut", outputs=(graph.node("cut").spec.with_(batch=2),))


def enlarge_by_an_operand(graph: Graph) -> None:
    large = graph.insert(source((2, 2, 4, 4, 4), "large"))
    graph.set_inputs("y", (*graph.inputs("y")[:2], large))


def mismatch_an_operand(graph: Graph) -> None:
    graph.set_inputs("y", (*graph.inputs("y")[:2], Value("x")))


def mistake_the_type_of_a_movement(graph: Graph) -> None:
    graph.update("cut", outputs=(graph.node("cut").spec.with_(dtype=torch.float16),))


def round_to_whole_numbers(graph: Graph) -> None:
    graph.update("y", outputs=(graph.node("y").spec.with_(dtype=torch.int64),))


def take_weights_for_whole_numbers(graph: Graph) -> None:
    graph.update("w_1", outputs=(graph.node("w_1").spec.with_(dtype=torch.int32),))


LAWS: dict[Callable[[Graph], None], str] = {
    make_cycle: "cycle",
    remove_output: r"expected one output node named 'output', got \[\]",
    add_second_output: r"expected one output node .* got \['output', 'again'\]",
    leave_a_gap: r"joined: input slots \[1\] are not 0..n-1",
    read_a_missing_result: r"cut: reads %joined.1, which does not exist",
    feed_an_input: "r: an input node has inputs",
    lose_a_tensor: "w_1: constant float32.4, 3, 3, 3. without a tensor of its shape",
    resize_a_tensor: "w_1: constant .* without a tensor of its shape",
    keep_a_stray_tensor: r"tensors of constants that are not in the graph: \['stray'\]",
    mistake_attributes: "cut: attributes .* are not those of slice",
    read_too_little: "y: its stages read more tensors than it has inputs",
    fuse_into_concat: "joined: concat takes no epilogue",
    sink_into_concat: "joined: concat takes no prologue",
    mistake_a_shape: r"cut: slice of .* gives float32\[2, 4, 4, 4\] nhwc, the node says",
    mistake_the_batch: r"cut: slice of .* gives float32\[2, .* the node says float32\[N, ",
    enlarge_by_an_operand: "y: epilogue operand .* does not broadcast",
    mismatch_an_operand: "y: epilogue operand .* does not broadcast",
    mistake_the_type_of_a_movement: r"cut: slice of .* the node says float16\[2, 4, 4, 4\]",
    round_to_whole_numbers: "y: conv2d of .* the node says int64",
    take_weights_for_whole_numbers: "w_1: constant int32.*, its tensor is torch.float32",
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_broken_law_is_named(law: Callable[[Graph], None]) -> None:
    graph = small()
    law(graph)
    with pytest.raises(GraphError, match=LAWS[law]):
        verify(graph)


def laid_out(graph: Graph) -> Graph:
    """As passes leave it: images have their channels innermost, but for what comes and goes."""
    for node in graph.nodes():
        nhwc = node.is_compute or node.op == INPUT
        specs = (spec.with_(layout=Layout.NHWC if nhwc else Layout.DENSE) for spec in node.outputs)
        graph.update(node.name, outputs=tuple(specs))
    return graph


@pytest.mark.parametrize("name, message", [
    ("x", "y: conv2d reads %x .*, expected nhwc"),
    ("y", "y: conv2d gives .* nhwc, the node says"),
    ("cut", "cut: slice gives .* nhwc, the node says"),
    ("w_1", "w_1: constant .* nhwc, expected a dense one"),
])  # fmt: skip
def test_a_layout_that_kernels_do_not_expect_is_named(name: str, message: str) -> None:
    graph = laid_out(small())
    verify_memory(graph)
    spec = graph.node(name).spec
    other = Layout.NHWC if spec.layout is Layout.DENSE else Layout.DENSE
    graph.update(name, outputs=(spec.with_(layout=other),))
    with pytest.raises(GraphError, match=message):
        verify_memory(graph)


def test_factors_of_two_types_are_named() -> None:
    graph = laid_out(small())
    graph.update("w_1", outputs=(graph.node("w_1").spec.with_(dtype=torch.float16),))
    with pytest.raises(GraphError, match=r"y: conv2d takes float16.* as input 1, expected torch.f"):
        verify_memory(graph)


def test_impossible_geometry_is_found_when_a_node_is_added() -> None:
    graph = small()
    with pytest.raises(InvalidInputError, match="concat"):
        graph.add("concat", (Value("x"), Value("r")), Concat(2))
    assert "concat_2" not in graph


def test_an_unknown_op_is_named_with_near_names() -> None:
    with pytest.raises(UnsupportedOpError, match=r"unknown op 'conv4d'; did you mean .*conv2d"):
        small().add("conv4d", (Value("x"),))


# Looking.


def test_inputs_are_split_by_who_reads_them() -> None:
    graph = small()
    scale = graph.add_constant(torch.ones(3, 1, 1), "scale", torch.float32)
    graph.set_inputs("y", (*graph.inputs("y"), scale))
    graph.update("y", prologue=(Stage("mul"), Stage("relu")))
    node = graph.node("y")
    assert graph.own_inputs(node) == (Value("x"), Value("w_1"))
    assert graph.operands(node) == (Value("r"),)
    assert graph.prologue_operands(node) == (scale,)


def test_uses_list_every_slot_and_the_output() -> None:
    graph = small()
    assert sorted(graph.uses(Value("y"))) == [("joined", 0), ("joined", 1)]
    assert sorted(graph.uses(Value("r"))) == [("output", 1), ("y", 2)]
    assert graph.uses(Value("y", 1)) == []


def test_nodes_come_after_their_sources() -> None:
    graph = small()
    late = graph.add("neg", (Value("x"),), name="late")
    graph.set_inputs("y", (*graph.inputs("y")[:2], graph.add("concat", (late, late), Concat(1))))
    order = [node.name for node in graph.nodes()]
    assert order.index("late") < order.index("y") < order.index("joined")
    assert nx.is_directed_acyclic_graph(graph.net)
    assert [node.name for node in graph.graph_inputs()] == ["x", "r"]


# Changing.


def test_a_copy_is_independent() -> None:
    graph = small()
    before = text.to_text(graph)
    copy = graph.copy()
    copy.update("y", epilogue=(), module_path="elsewhere")
    copy.redirect(Value("y"), Value("r"))
    copy.remove(["y", "w_1"])
    copy.add_constant(torch.zeros(2), "more", torch.float32)
    assert text.to_text(graph) == before and graph.tensors.keys() == {"w_1"}
    verify(graph)
    assert graph.copy().tensors["w_1"] is graph.tensors["w_1"], "tensors are shared, not copied"


def test_names_are_never_given_twice() -> None:
    graph = small()
    names = {graph.fresh_name("relu") for _ in range(3)}
    first, second = (graph.add("relu", (Value("x"),)).node for _ in range(2))
    assert len(names | {first, second}) == 5
    graph.insert(replace(source((1,)), name="relu_9"))
    graph.counter = 8
    assert graph.fresh_name("relu") == "relu_10"
    with pytest.raises(GraphError, match="already a node named y"):
        graph.insert(source((1,), "y"))


def test_redirect_moves_every_reader_and_nothing_else() -> None:
    graph = small()
    made = graph.add("neg", (Value("y"),), name="made")
    graph.redirect(Value("r"), Value("x"))
    assert graph.outputs() == (Value("cut"), Value("x"))
    assert graph.uses(Value("r")) == []
    assert graph.inputs("joined") == (Value("y"), Value("y")) and graph.uses(made) == []


def test_replaced_nodes_hand_on_their_path_and_origins() -> None:
    graph = small()
    graph.update("y", origins=("conv", "relu"), rules=("first",))
    graph.update("cut", origins=("relu", "cut"))
    both = [graph.node("y"), graph.node("cut")]
    made = graph.node(graph.add("relu", (Value("y"),), like=both, rule="second").node)
    assert made.module_path == "block.conv"
    assert made.origins == ("conv", "relu", "cut")
    assert made.rules == ("first", "second")


# Printing.

TEXT = """\
%x = input : float32[2, 3, 4, 4]
%r = input : float32[2, 4, 4, 4]
%w_1 = constant : float32[4, 3, 3, 3]  # w
%y = conv2d(%x, %w_1, %r) {padding=1x1x1x1} [add, relu] : float32[2, 4, 4, 4] nhwc  # block.conv
%joined = concat(%y, %y) {dim=1} : float32[2, 8, 4, 4] nhwc
%cut = slice(%joined) {dim=1, start=1, stop=5} : float32[2, 4, 4, 4] nhwc
return %cut, %r
"""

DOT = """\
digraph "small" {
  node [shape=box, style=filled, fontname=monospace];
  "x" [label="input\\nfloat32[2, 3, 4, 4]", fillcolor="#e2e3e5"];
  "r" [label="input\\nfloat32[2, 4, 4, 4]", fillcolor="#e2e3e5"];
  "y" [label="conv2d [add, relu]\\nfloat32[2, 4, 4, 4] nhwc\\nblock.conv", fillcolor="#cfe2ff"];
  "joined" [label="concat\\nfloat32[2, 8, 4, 4] nhwc", fillcolor="#fff3cd"];
  "cut" [label="slice\\nfloat32[2, 4, 4, 4] nhwc", fillcolor="#fff3cd"];
  "output" [label="output", fillcolor="#e2e3e5"];
  "x" -> "y";
  "r" -> "y";
  "r" -> "output";
  "y" -> "joined";
  "y" -> "joined";
  "joined" -> "cut";
  "cut" -> "output";
}
"""


def test_text() -> None:
    graph = small()
    assert text.to_text(graph) == TEXT
    without = "".join(line for line in TEXT.splitlines(keepends=True) if "constant" not in line)
    assert text.to_text(graph, constants=False) == without


def test_text_of_prologues_batches_and_later_results() -> None:
    graph = small()
    graph.update("y", prologue=(Stage("sub", literal=0.5, reverse=True), Stage("relu")))
    assert "{padding=1x1x1x1} <rsub(0.5), relu> [add, relu]" in text.to_text(graph)
    assert str(Value("split", 1)) == "%split.1"
    assert str(TensorSpec((8, 3), torch.float16, batch=4)) == "float16[2N, 3]"


def test_dot() -> None:
    assert text.to_dot(small()) == DOT


def test_constants_have_a_value_of_their_own_dtype() -> None:
    graph = small()
    exact = graph.add_constant(torch.full((2,), 1 / 3, dtype=torch.float64), "third", torch.float32)
    assert graph.node(exact.node).op == CONSTANT
    assert graph.spec(exact).dtype is torch.float32
    assert graph.constant(exact).dtype is torch.float64, "a folded tensor may be more precise"
