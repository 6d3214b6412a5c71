"""Properties of pointwise functions as stages, beside those of their ops."""

from __future__ import annotations

import torch
from convloom.compiler.graph.ir import INPUT, OUTPUT, Graph, NoAttributes, Node, Value
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import fuse_epilogues
from convloom.kernels.contract.scalars import Scalar
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.tile.conv_geometry import Conv2d

from . import nets


def image(graph: Graph, name: str, shape: tuple[int, ...]) -> Value:
    return nets.add_input(graph, name, shape)


def start(op: str) -> tuple[Graph, Value]:
    """A graph with one product of the inputs `x` and the constants `w` and `b`, or with an image
    of as many channels."""
    graph = Graph()
    generator = torch.Generator().manual_seed(3)
    if op in ("conv2d", INPUT):
        channels = 3 if op == "conv2d" else 4
        x, attributes = image(graph, "x", (2, channels, 5, 4)), Conv2d(padding=(1, 1, 1, 1))
        w, b = (4, 3, 3, 3), (4, 1, 1)
    else:
        x, attributes = image(graph, "x", (2, 3)), None
        w, b = (4, 3), (4,)
    weight = graph.add_constant(torch.randn(w, generator=generator), "w", torch.float32)
    graph.add_constant(torch.randn(b, generator=generator), "b", torch.float32)
    return graph, x if op == INPUT else graph.add(op, (x, weight), attributes)


def finish(graph: Graph, *values: Value) -> Graph:
    graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), values)
    verify(graph)
    return graph


def safely(graph: Graph, value: Value) -> Value:
    """Into the range in which every scalar is defined and no step is steep."""
    squashed = graph.add("sigmoid", (value,))
    return graph.add("add", (squashed,), Pointwise(literal=0.6))


def becomes_a_stage(scalar: Scalar, op: str = "conv2d") -> None:
    """f(y), f(y, r), f(r, y), f(y, literal) and f(literal, y) of a product y are one node."""
    forms = {
        1: ["unary"], 2: ["tensor", "reversed", "literal", "left"], 3: ["where"],
    }[scalar.operands]  # fmt: skip
    for form in forms:
        graph, y = start(op)
        shape = graph.spec(y).shape
        y = safely(graph, y)
        parameters = scalar.examples[-1]
        if form in ("tensor", "reversed"):
            pair = (y, image(graph, "r", shape))
            pair = pair if form == "tensor" else pair[::-1]
            y = graph.add(scalar.name, pair, Pointwise(parameters))
        elif form == "where":
            y = graph.add(scalar.name, (image(graph, "c", shape), y, image(graph, "r", shape)))
        else:
            literal = None if form == "unary" else 1.5
            y = graph.add(scalar.name, (y,), Pointwise(parameters, literal, reverse=form == "left"))
        if scalar.boolean:  # Products store no booleans.
            y = graph.add("choose", (y,), Pointwise((2.0, -0.5)))
        finish(graph, y)
        after = fuse_epilogues(graph.copy(), Ledger())
        verify(after)
        assert len(after.compute_nodes()) == 1
        inputs = [value.abs() + 0.5 for value in nets.inputs_for(graph)]
        nets.assert_same_meaning(graph, after, inputs)
