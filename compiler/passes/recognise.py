"""Composite ops that torch.export takes apart, put together again.

Local response normalisation arrives as square, pad, 3-d average pooling, scale, shift, power and
division; Lp pooling as power, average pooling, sign, absolute value, ReLU and root; hand-written
SiLU, hard-swish and mish as products.
"""

from __future__ import annotations

import math
from typing import Any

from ...kernels.movement.pad import Pad
from ...kernels.movement.pointwise import Pointwise
from ...kernels.movement.rearrangement import Reshape
from ...kernels.normalisation.lrn import LocalResponseNorm
from ...kernels.pooling.pool_window import AvgPool2d, AvgPool3d, LpPool2d
from ..fusion import extension_rules, refusals
from ..fusion.pattern import (
    Call,
    Guard,
    Match,
    Rewrite,
    Rule,
    Var,
    always,
    apply_rules,
    replace_root,
)  # fmt: skip
from ..graph.ir import Graph, Value
from ..graph.ledger import Ledger
from .recognise_pools import POOL_RULES

X = Var("x")


def _window(found: Match) -> int | None:
    """How many channels the pooling averages, or None if it is something else."""
    pool, pad = found.nodes["pool"].attributes.expect(AvgPool3d), found.nodes["pad"].attributes
    size = pool.kernel[0]
    around = Pad((0, 0, size // 2, 0, 0), (0, 0, (size - 1) // 2, 0, 0))
    return size if pool == AvgPool3d((size, 1, 1)) and pad == around else None


def _literal(found: Match, name: str) -> float | None:
    attributes = found.nodes[name].attributes.expect(Pointwise)
    return None if attributes.reverse else attributes.literal


def _lrn_guard(graph: Graph, found: Match) -> str | None:
    if _window(found) is None:
        return "the pooling does not run over neighbouring channels"
    literals = _literal(found, "alpha"), _literal(found, "k"), _exponent(found, "beta")
    if None in literals:
        return "alpha, beta and k are not all constant numbers"
    if graph.spec(found.values["x"]).shape != found.root.spec.shape:
        return f"the result, {found.root.spec}, does not have the shape of the input"
    return None


def _exponent(found: Match, name: str) -> float | None:
    """What a power raises to, by its name or by a constant."""
    node = found.nodes[name]
    shortcuts = {"square": 2.0, "sqrt": 0.5, "identity": 1.0}
    return shortcuts.get(node.op) or _literal(found, name)


def _make_lrn(graph: Graph, found: Match) -> Value:
    window, beta = _window(found), _exponent(found, "beta")
    alpha, k = _literal(found, "alpha"), _literal(found, "k")
    assert window is not None and alpha is not None and k is not None and beta is not None
    attributes = LocalResponseNorm(size=window, alpha=alpha, beta=beta, k=k)
    return replace_root(graph, found, "local_response_norm", (found.values["x"],), attributes)


def _lrn_rule() -> Rule:
    padded = Call("pad", Call("reshape", Call("square", X)), name="pad")
    pooled = Call("avg_pool3d", padded, name="pool")
    scaled = Call("mul", Call("reshape", Call("reshape", pooled)), name="alpha")
    power = Call(("pow", "sqrt", "square"), Call("add", scaled, name="k"), name="beta")
    return Rule(
        "x / (k + alpha*mean_c(x²))^beta => local_response_norm(x)",
        Call("div", X, power, name="root"),
        _make_lrn,
        _lrn_guard,
    )


def _lp_guard(graph: Graph, found: Match) -> str | None:
    pool = found.nodes["pool"].attributes.expect(AvgPool2d)
    area = _literal(found, "area")
    if any(pool.padding) or pool.divisor_override is not None:
        return "the average pooling is padded or has a divisor of its own"
    if area != pool.kernel[0] * pool.kernel[1]:
        window = pool.kernel[0] * pool.kernel[1]
        return f"the mean is multiplied by {area}, not by the window's area, {window}"
    return None


def _lp_root_guard(graph: Graph, found: Match) -> str | None:
    p, root = _exponent(found, "power"), _exponent(found, "root")
    if p is None or root is None or not abs(root * p - 1) <= 1e-6:
        return f"the root, {root}, does not undo the power, {p}"
    if p < 0:
        return f"the power {p} is negative, and Lp pooling takes positive ones"
    return _lp_guard(graph, found)


def _make_lp(graph: Graph, found: Match) -> Value:
    pool, p = found.nodes["pool"].attributes, _exponent(found, "power")
    assert isinstance(pool, AvgPool2d) and p is not None
    attributes = LpPool2d(p, pool.kernel, pool.stride, pool.ceil_mode)
    return replace_root(graph, found, "lp_pool2d", (found.values["x"],), attributes)


POWERS = ("pow", "square", "sqrt", "identity")


def _make_lp_of_sequences(graph: Graph, found: Match) -> Value:
    """A sequence is pooled as an image of one row."""
    pool, p = found.nodes["pool"], _exponent(found, "power")
    assert p is not None
    window = pool.attributes.expect(AvgPool2d)
    attributes = LpPool2d(p, window.kernel, window.stride, window.ceil_mode)
    like = list(reversed(found.consumed))
    row = Reshape(graph.spec(graph.inputs(pool.name)[0]).shape)
    x = graph.add("reshape", (found.values["x"],), row, like=like)
    y = graph.add("lp_pool2d", (x,), attributes, like=like)
    return replace_root(graph, found, "reshape", (y,), Reshape(found.root.spec.shape))


def _lp_rule(of_sequences: bool) -> Rule:
    powered = Call(POWERS, X, name="power")
    if of_sequences:
        row = Call("avg_pool2d", Call("reshape", powered), name="pool")
        pooled = Call("reshape", row)
    else:
        pooled = Call("avg_pool2d", powered, name="pool")
    magnitude = Call("relu", Call("abs", pooled))
    # sign(v) and |v| read the same pooled value, so the pooling has two readers inside the match.
    signed = Call("mul", Call("sign", pooled), magnitude)
    return Rule(
        "(R·S·avg_pool(x^p))^(1/p) => lp_pool2d(x, p)",
        Call(POWERS, Call("mul", signed, name="area"), name="root"),
        _make_lp_of_sequences if of_sequences else _make_lp,
        _lp_root_guard,
    )


def _pointwise(name: str) -> Rewrite:
    """Puts a pointwise function of x in the place of a match."""
    return lambda graph, found: replace_root(graph, found, name, (found.values["x"],), Pointwise())


def _product_rule(name: str, equation: str, factor: Call, guard: Guard = always) -> Rule:
    pattern = Call("mul", X, factor, name="root", commutes=True)
    return Rule(f"{equation} => {name}(x)", pattern, _pointwise(name), guard)


def _softplus_guard(graph: Graph, found: Match) -> str | None:
    (beta, *_) = _parameters(found, "softplus")
    return None if beta == 1.0 else f"softplus has beta={beta:g}, and in mish it is 1"


def _parameters(found: Match, name: str) -> tuple[float, ...]:
    return found.nodes[name].attributes.expect(Pointwise).parameters


def _shrink_rule(name: str, equation: str, pattern: Call, width: Any) -> Rule:
    """width: what a match shrinks by, or None where it is something else."""

    def rewrite(graph: Graph, found: Match) -> Value:
        parameters = Pointwise((width(found),))
        return replace_root(graph, found, name, (found.values["x"],), parameters)

    def guard(graph: Graph, found: Match) -> str | None:
        return "positive and negative values shrink differently" if width(found) is None else None

    return Rule(f"{equation} => {name}(x, w)", pattern, rewrite, guard)


def _hard_width(found: Match) -> float | None:
    """By how much two thresholds shrink; below zero they overlap."""
    width, value = _parameters(found, "above")
    alike = _parameters(found, "below") == (width, 0.0) and value == 0
    return width if alike and width >= 0 else None


def _soft_width(found: Match) -> float | None:
    low, high = _parameters(found, "clamp")
    return high if low == -high and 0 <= high < math.inf else None


SHRINK_RULES = (
    _shrink_rule(
        "hardshrink",
        "threshold(x, w) - threshold(-x, w)",
        Call(
            "sub", Call("threshold", X, name="above"),
            Call("threshold", Call("neg", X), name="below"), name="root",
        ),
        _hard_width,
    ),
    _shrink_rule(
        "softshrink",
        "x - clamp(x, -w, w)",
        Call("sub", X, Call("clamp", X, name="clamp"), name="root"),
        _soft_width,
    ),
)  # fmt: skip

SQUARE = Rule("x·x => square(x)", Call("mul", X, X, name="root"), _pointwise("square"))
RULES = (
    SQUARE,
    _lrn_rule(),
    _lp_rule(of_sequences=False),
    _lp_rule(of_sequences=True),
    _product_rule("silu", "x·sigmoid(x)", Call("sigmoid", X)),
    _product_rule("hardswish", "x·hardsigmoid(x)", Call("hardsigmoid", X)),
    _product_rule(
        "mish", "x·tanh(softplus(x))", Call("tanh", Call("softplus", X, name="softplus")),
        _softplus_guard,
    ),
    *SHRINK_RULES,
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
