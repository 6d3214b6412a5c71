"""Composite ops that torch.export takes apart, put together again.

Local response normalisation arrives as square, pad, 3-d average pooling, scale, shift, power and
division; Lp pooling as power, average pooling, sign, absolute value, ReLU and root; hand-written
SiLU, hard-swish and mish as products.
"""

from __future__ import annotations

import math

from ...kernels.contract.op import Attributes
from ...kernels.movement.pad import Pad
from ...kernels.movement.pointwise import Pointwise
from ...kernels.movement.rearrangement import Reshape
from ...kernels.normalisation.lrn import LocalResponseNorm
from ...kernels.pooling.pool_window import AvgPool2d, AvgPool3d, LpPool2d
from ..fusion import extension_rules, refusals
from ..fusion.pattern import Call, Match, Rule, Var, apply_rules, becomes
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger
from .recognise_pools import POOL_RULES

X = Var("x")
POWERS = ("pow", "square", "sqrt", "identity")


def _literal(node: Node) -> float | None:
    attributes = node.attributes.expect(Pointwise)
    return None if attributes.reverse else attributes.literal


def _exponent(node: Node) -> float | None:
    """What a power raises to, by its name or by a constant."""
    shortcuts = {"square": 2.0, "sqrt": 0.5, "identity": 1.0}
    return shortcuts.get(node.op) or _literal(node)


def _lrn(graph: Graph, found: Match) -> LocalResponseNorm | str:
    pool, pad = found.nodes["pool"].attributes.expect(AvgPool3d), found.nodes["pad"].attributes
    size = pool.kernel[0]
    around = Pad((0, 0, size // 2, 0, 0), (0, 0, (size - 1) // 2, 0, 0))
    if pool != AvgPool3d((size, 1, 1)) or pad != around:
        return "the pooling does not run over neighbouring channels"
    alpha, k = map(_literal, found.those("alpha", "k"))
    beta = _exponent(found.nodes["beta"])
    if alpha is None or k is None or beta is None:
        return "alpha, beta and k are not all constant numbers"
    if graph.spec(found.values["x"]).shape != found.root.spec.shape:
        return f"the result, {found.root.spec}, does not have the shape of the input"
    return LocalResponseNorm(size=size, alpha=alpha, beta=beta, k=k)


def _lrn_rule() -> Rule:
    padded = Call("pad", Call("reshape", Call("square", X)), name="pad")
    pooled = Call("avg_pool3d", padded, name="pool")
    scaled = Call("mul", Call("reshape", Call("reshape", pooled)), name="alpha")
    power = Call(("pow", "sqrt", "square"), Call("add", scaled, name="k"), name="beta")
    equation = "x / (k + alpha*mean_c(x²))^beta => local_response_norm(x)"
    return becomes("local_response_norm", equation, Call("div", X, power), _lrn)


def _lp(graph: Graph, found: Match) -> LpPool2d | str:
    p, root = _exponent(found.nodes["power"]), _exponent(found.root)
    if p is None or root is None or not abs(root * p - 1) <= 1e-6:
        return f"the root, {root}, does not undo the power, {p}"
    if p < 0:
        return f"the power {p} is negative, and Lp pooling takes positive ones"
    pool, area = found.nodes["pool"].attributes.expect(AvgPool2d), _literal(found.nodes["area"])
    if any(pool.padding) or pool.divisor_override is not None:
        return "the average pooling is padded or has a divisor of its own"
    window = pool.kernel[0] * pool.kernel[1]
    if area != window:
        return f"the mean is multiplied by {area}, not by the window's area, {window}"
    return LpPool2d(p, pool.kernel, pool.stride, pool.ceil_mode)


def _as_pooled(graph: Graph, found: Match) -> list[Value]:
    """x in the shape of what is pooled: a sequence is pooled as an image of one row."""
    shape = graph.spec(graph.inputs(found.nodes["pool"].name)[0]).shape
    x = found.values["x"]
    if graph.spec(x).shape == shape:
        return [x]
    return [graph.add("reshape", (x,), Reshape(shape), like=found.consumed[::-1])]


def _lp_rule(of_sequences: bool) -> Rule:
    powered = Call(POWERS, X, name="power")
    pooled = Call("avg_pool2d", Call("reshape", powered) if of_sequences else powered, name="pool")
    pooled = Call("reshape", pooled) if of_sequences else pooled
    magnitude = Call("relu", Call("abs", pooled))
    # sign(v) and |v| read the same pooled value, so the pooling has two readers inside the match.
    signed = Call("mul", Call("sign", pooled), magnitude)
    pattern = Call(POWERS, Call("mul", signed, name="area"))
    equation = "(R·S·avg_pool(x^p))^(1/p) => lp_pool2d(x, p)"
    return becomes("lp_pool2d", equation, pattern, _lp, _as_pooled)


def _plain(graph: Graph, found: Match) -> Attributes | str:
    return Pointwise()


def _product_with(factor: Call) -> Call:
    return Call("mul", X, factor, commutes=True)


def _mish(graph: Graph, found: Match) -> Attributes | str:
    (beta, *_) = _parameters(found, "softplus")
    return Pointwise() if beta == 1.0 else f"softplus has beta={beta:g}, and in mish it is 1"


def _parameters(found: Match, name: str) -> tuple[float, ...]:
    return found.nodes[name].attributes.expect(Pointwise).parameters


def _hardshrink(graph: Graph, found: Match) -> Attributes | str:
    """By how much two thresholds shrink; below zero they overlap."""
    width, value = _parameters(found, "above")
    alike = _parameters(found, "below") == (width, 0.0) and value == 0
    return Pointwise((width,)) if alike and width >= 0 else DIFFERENTLY


def _softshrink(graph: Graph, found: Match) -> Attributes | str:
    low, high = _parameters(found, "clamp")
    return Pointwise((high,)) if low == -high and 0 <= high < math.inf else DIFFERENTLY


DIFFERENTLY = "positive and negative values shrink differently"
SQUARE = becomes("square", "x·x => square(x)", Call("mul", X, X), _plain)
RULES = (
    SQUARE,
    _lrn_rule(),
    _lp_rule(of_sequences=False),
    _lp_rule(of_sequences=True),
    becomes("silu", "x·sigmoid(x) => silu(x)", _product_with(Call("sigmoid", X)), _plain),
    becomes(
        "hardswish", "x·hardsigmoid(x) => hardswish(x)", _product_with(Call("hardsigmoid", X)),
        _plain,
    ),
    becomes(
        "mish", "x·tanh(softplus(x)) => mish(x)",
        _product_with(Call("tanh", Call("softplus", X, name="softplus"))), _mish,
    ),
    becomes(
        "hardshrink", "threshold(x, w) - threshold(-x, w) => hardshrink(x, w)",
        Call(
            "sub", Call("threshold", X, name="above"),
            Call("threshold", Call("neg", X), name="below"),
        ),
        _hardshrink,
    ),
    becomes(
        "softshrink", "x - clamp(x, -w, w) => softshrink(x, w)",
        Call("sub", X, Call("clamp", X, name="clamp")), _softshrink,
    ),
)  # fmt: skip


def _computes_more(graph: Graph, found: Match) -> str | None:
    """Refuses nodes that compute more than their op, as addcmul's product does: the sum behind it
    would be lost."""
    busy = [node for node in found.consumed if node.epilogue]
    return refusals.has_epilogue(busy[0]) if busy else None


def recognise_composites(graph: Graph, ledger: Ledger) -> Graph:
    """Rebuilds the composite ops that export expresses by simpler ones.

    Postcondition: no part of a recognised composite is left, among them calls that have no kernel.
    """
    rules = (*extension_rules.REWRITES, *RULES, *POOL_RULES)
    return apply_rules(graph, rules, ledger, _computes_more)
