"""Makes one kernel of a whole small network (`small_net`): convolutions that pool their own
results, and the classifier behind them.

Runs on what other fusions have made, so that it need not know how a convolution takes its pooling
in or linear layers become a head.
"""

from __future__ import annotations

from ....kernels.fused import links, small_net
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.fused.small_net import SmallNet
from ...fusion import declaration, partition, refusals
from ...fusion.declaration import Form, Fusion
from ...fusion.pattern import Call, Match
from ...graph.ir import Graph
from ...graph.ledger import Ledger
from .heads import LAYERS, as_head

MOST_INTERPRETED = 8
"""Images that the interpreter is given one after the other."""
CONVS = tuple(f"layer{number}" for number in range(small_net.MOST_LAYERS))
"""What the convolutions are called, in the order of the data."""


def _attributes(graph: Graph, found: Match) -> SmallNet:
    layers = (node.attributes.expect(ConvPool) for node in found.those(*CONVS))
    return SmallNet(tuple(layers), as_head(found.root))


_inputs = declaration.links(*CONVS, "root")


def _ends_in_pooling(graph: Graph, found: Match) -> str | None:
    for node in found.those(*CONVS):
        if node.epilogue:
            return f"{node.name} goes on after its pooling, which has to come last in a layer"
    return None


def _few_interpreted(graph: Graph, found: Match) -> str | None:
    images = found.root.spec.shape[0]
    on_gpu = graph.goal is None or graph.goal.target.is_gpu
    if on_gpu or images <= MOST_INTERPRETED:
        return None
    return f"without a GPU {images} images would be computed one after the other"


def _unsupported(graph: Graph, found: Match) -> str | None:
    attributes, inputs = _attributes(graph, found), tuple(_inputs(graph, found))
    own = links.tensors(attributes.links, inputs)
    for name in links.weights(attributes.head.chain):
        if not graph.is_constant(own[name]):
            return f"a weight of {found.root.name} is computed, not a constant of the module"
    return small_net.unsupported(attributes, tuple(graph.spec(value) for value in inputs))


def _pattern(layers: int) -> Call:
    """A classifier behind that many convolutions."""
    conv: Call | None = None
    for name in CONVS[:layers]:
        conv = Call("conv_pool", first=conv, name=name)
    return Call(LAYERS, first=Call("flatten_pixels", conv))


def _equation(layers: int) -> str:
    inner = "x"
    for _ in range(layers):
        inner = f"conv_pool({inner}, w)"
    return f"head(flatten({inner})) => small_net(x, ...)"


FUSION = Fusion(
    op="small_net",
    # The longest first: of equal savings the earlier one is taken.
    forms=tuple(Form("small-net", _equation(layers), _pattern(layers)) for layers in (3, 2, 1)),
    attributes=_attributes,
    inputs=_inputs,
    refusals=(_ends_in_pooling, refusals.plain("root"), _few_interpreted, _unsupported),
    holds=LAYERS,
)
RULES = FUSION.rules


def fuse_small_nets(graph: Graph, ledger: Ledger) -> Graph:
    """Joins the layers of a small network where that saves time on the goal's machine."""
    return partition.choose(graph, RULES, ledger)
