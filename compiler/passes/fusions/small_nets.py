"""Makes one kernel of a whole small network (`small_net`): convolutions that pool their own
results, and the classifier behind them.

Runs on what other fusions have made, so that it need not know how a convolution takes its pooling
in or linear layers become a head.
"""

from __future__ import annotations

from ....kernels.fused import links, small_net
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.fused.small_net import SmallNet
from ...fusion import partition, refusals
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, Rule
from ...graph.ir import Graph, Node, Value
from ...graph.ledger import Ledger
from .heads import LAYERS, as_head

LABEL = "small-net"
MOST_INTERPRETED = 8
"""Images that the interpreter is given one after the other."""


def _layers(found: Match) -> list[Node]:
    """The convolutions, in the order of the data."""
    names = sorted(name for name in found.nodes if name.startswith("layer"))
    return [found.nodes[name] for name in names]


def _parts(graph: Graph, found: Match) -> tuple[SmallNet, tuple[Value, ...]]:
    """Attributes and inputs of the whole."""
    layers = _layers(found)
    inputs = [graph.own_inputs(layers[0])[0]]
    attributes = []
    for node in layers:
        assert isinstance(node.attributes, ConvPool)
        attributes.append(node.attributes)
        inputs += graph.own_inputs(node)[1:]
    head, last = as_head(graph, found.root)
    return SmallNet(tuple(attributes), head), (*inputs, *last[1:])


def _guard(graph: Graph, found: Match) -> str | None:
    for node in _layers(found):
        if node.epilogue:
            return f"{node.name} goes on after its pooling, which has to come last in a layer"
    root = found.root
    if root.prologue:
        return refusals.has_prologue(root)
    if graph.goal is not None and not graph.goal.target.is_gpu:
        images = root.spec.shape[0]
        if images > MOST_INTERPRETED:
            return f"without a GPU {images} images would be computed one after the other"
    attributes, inputs = _parts(graph, found)
    own = links.tensors(attributes.links, inputs)
    for name in links.weights(attributes.head.chain):
        if not graph.is_constant(own[name]):
            return f"a weight of {root.name} is computed, not a constant of the module"
    return small_net.unsupported(attributes, tuple(graph.spec(value) for value in inputs))


def _build(graph: Graph, found: Match) -> Fused:
    attributes, inputs = _parts(graph, found)
    return Fused("small_net", attributes, inputs, {found.root.name: 0})


def _pattern(layers: int) -> Call:
    """A classifier behind that many convolutions."""
    conv: Call | None = None
    for number in range(layers):
        conv = Call("conv_pool", first=conv, name=f"layer{number}")
    return Call(LAYERS, first=Call("flatten_pixels", conv))


def _equation(layers: int) -> str:
    inner = "x"
    for _ in range(layers):
        inner = f"conv_pool({inner}, w)"
    return f"head(flatten({inner})) => small_net(x, ...)"


RULES = tuple(
    Rule(_equation(layers), _pattern(layers), build=_build, guard=_guard, label=LABEL)
    for layers in (3, 2, 1)
)
"""The longest first: of equal savings the earlier rule is taken."""


def fuse_small_nets(graph: Graph, ledger: Ledger) -> Graph:
    """Joins the layers of a small network where that saves time on the goal's machine."""
    return partition.choose(graph, RULES, ledger)
