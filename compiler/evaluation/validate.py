"""Translation validation: after every pass the graph must compute what it did before
(CONVLOOM_CHECK=2).

The captured graph is evaluated in fp64 on one draw of its inputs, and after each pass what the pass
rewrote. Values have numbers: the same op of the same numbers is not evaluated again, and a result
that agrees with what one of the captured ops behind it was before takes that value's number, so
that all that reads it has been evaluated, too. A pass costs what it rewrites, however deep the
network is; roundings do not add up, and no later layer hides an error.

What must agree are the outputs, and every node that a pass left as it was: the same op and stages
that stand for the same captured ops. Where one does not, the pass is run again on a copy and the
graph compared after each accepted rewrite, so that the error names the rule and what it made.

Source: A. Pnueli, M. Siegel, E. Singerman, Translation Validation, 1998.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...errors import ConvloomError, GraphError
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, Node, Value
from ..graph.ledger import Ledger
from ..graph.verify import verify
from .evaluate import batch_of, evaluate_node, rows_of

RELATIVE = 1e-9
"""Largest error of an element, relative to it plus the rms of its tensor; fp64 rounds at 1e-16."""
CANCELLED = 1e-4
"""Of the rms of what a node reads: `RELATIVE` of it may be left where its result cancels out."""
BATCH = 2
"""Samples of the draw where the batch is dynamic."""
MOST_NAMES = 8
"""Captured ops that a message lists."""

Rewriting = Callable[[Graph, Ledger], Graph]


def _positive(shape: tuple[int, ...], **options: Any) -> torch.Tensor:
    return torch.rand(shape, **options) + 0.1


DRAWS: tuple[Callable[..., torch.Tensor], ...] = (torch.randn, _positive)
"""Numbers for the inputs, the second for networks that take roots or logarithms of them."""


@dataclass(frozen=True)
class PassCheck:
    """What one pass did. changed: nodes that it made or changed; error: the largest relative error
    of what agrees with a value from before; problem: what does not, in words."""

    name: str
    changed: int
    error: float
    problem: str | None = None


@dataclass(frozen=True)
class _State:
    """A graph at some moment, and the numbers of its values."""

    graph: Graph
    numbers: dict[Value, int]

    @cached_property
    def holders(self) -> dict[str, list[str]]:
        """The nodes that stand for each captured op."""
        holders: dict[str, list[str]] = {}
        for node in self.graph.nodes():
            for origin in node.origins:
                holders.setdefault(origin, []).append(node.name)
        return holders

    def candidates(self, node: Node) -> Iterator[int]:
        """The numbers that a later node's results may have, the likeliest first."""
        names = [name for origin in reversed(node.origins) for name in self.holders.get(origin, ())]
        for name in dict.fromkeys((*names, node.name)):
            if name in self.graph:
                for index in range(len(self.graph.node(name).outputs)):
                    yield self.numbers[Value(name, index)]

    def has(self, node: Node) -> bool:
        """Whether a later node is one of this graph's, as it was but for what it reads."""
        return node.name in self.graph and _content(node) == _content(self.graph.node(node.name))


def _content(node: Node) -> tuple[Any, ...]:
    shapes = tuple(spec.shape for spec in node.outputs)
    return node.op, node.attributes, node.epilogue, node.prologue, node.origins, shapes


class _CulpritError(Exception):
    """A rewrite after which the graph computes something else: its rule, what it made, and the
    problem."""


@dataclass
class _Watched(Ledger):
    """A ledger that shows what each accepted rewrite made."""

    look: Callable[[str, str], None] = lambda rule, into: None

    def accept(
        self, rule: str, nodes: Iterable[Node], into: str, bytes_saved: int = 0, **figures: Any
    ) -> None:
        super().accept(rule, nodes, into, bytes_saved, **figures)
        self.look(rule, into)


class Validation:
    """The values of one graph while passes rewrite it; `checks` tells what each of them did.

    inputs: instead of a draw, one tensor per input of the graph. strict: a wrong pass is an error;
    otherwise the values from before it go on being the true ones.
    """

    def __init__(self, inputs: Sequence[torch.Tensor] | None = None, strict: bool = True) -> None:
        self.checks: list[PassCheck] = []
        self._given, self._strict = inputs, strict
        self._paths: dict[str, str] = {}
        self._inputs: Sequence[torch.Tensor] = ()
        self._state = _State(Graph(), {})
        self._known: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._scales: dict[int, float] = {}
        self._count = 0
        self._error = 0.0

    def begin(self, graph: Graph) -> None:
        """Evaluates the graph that the passes start from, on the inputs that were given, the first
        draw that leaves no NaN and no Inf in its outputs, or else the first of all.

        Raises: GraphError for a node that cannot be evaluated.
        """
        self.checks.clear()
        self._paths = {node.name: node.module_path for node in graph.nodes()}
        draws = [_drawn(graph, draw) for draw in (*DRAWS, DRAWS[0])]
        for inputs in draws if self._given is None else [self._given]:
            self._known, self._tensors, self._inputs = {}, {}, inputs
            self._state = self._evaluated(graph, _State(Graph(), {}))
            if all(self._tensor(number).isfinite().all() for number in self._outputs(self._state)):
                break

    def check(self, name: str, run: Rewriting, graph: Graph) -> None:
        """Compares what the pass `run` made of the last graph with it.

        Raises: GraphError for a graph that breaks a law or computes something else; it names the
        rewrite, where running the pass again finds it.
        """
        self._error = 0.0
        changed = sum(not self._state.has(node) for node in graph.compute_nodes())
        try:
            state = self._agreeing(graph, self._state)
        except ConvloomError as error:
            culprit = self._culprit(run)
            problem = _message(name, graph, error if culprit is None else culprit)
            self.checks.append(PassCheck(name, changed, self._error, problem))
            if self._strict:
                raise GraphError(problem) from error
            state = self._evaluated(graph, self._state, trusted=True)
        else:
            self.checks.append(PassCheck(name, changed, self._error))
        self._take(state)

    def truth(self, name: str) -> torch.Tensor | None:
        """What the first result of a node of the last graph should be, in fp64; None where the
        graph has no such node."""
        number = self._state.numbers.get(Value(name))
        return None if number is None else self._tensor(number)

    def _culprit(self, run: Rewriting) -> _CulpritError | None:
        """The first rewrite of a pass that changes what the last graph computes."""
        graph, state = self._state.graph.copy(), self._state

        def look(rule: str, into: str) -> None:
            nonlocal state
            try:
                state = self._agreeing(graph, state)
            except ConvloomError as error:
                made = self._described(graph, into) if into in graph else into
                raise _CulpritError(rule, made, error) from error

        try:
            run(graph, _Watched(look=look))
        except _CulpritError as culprit:
            return culprit
        return None

    def _take(self, state: _State) -> None:
        """Makes a state the last one, and drops all that it does not hold."""
        held = set(state.numbers.values())
        self._state = state
        self._tensors = {n: tensor for n, tensor in self._tensors.items() if n in held}
        self._known = {key: ns for key, ns in self._known.items() if held.issuperset(ns)}

    def _agreeing(self, graph: Graph, before: _State) -> _State:
        """The state of a graph that computes what the one before does.

        Raises: GraphError for the first node of which that is not true.
        """
        verify(graph)
        state = self._evaluated(graph, before)
        for node in graph.nodes():
            if node.op == OUTPUT:
                pairs = list(zip(self._outputs(before), self._outputs(state), strict=True))
            elif before.has(node):
                values = [Value(node.name, index) for index in range(len(node.outputs))]
                pairs = [(before.numbers[value], state.numbers[value]) for value in values]
            else:
                continue
            for index, (old, new) in enumerate(pairs):
                if old != new:
                    self._compare(graph, Value(node.name, index), old, new)
        return state

    def _compare(self, graph: Graph, value: Value, old: int, new: int) -> None:
        expected, got = self._tensor(old), self._tensor(new)
        where = f"{self._described(graph, value.node)}, result {value.index}"
        if expected.shape != got.shape:
            shapes = f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
            raise GraphError(f"{where}: {shapes}")
        errors = relative_errors(got, expected)
        if (worst := errors.max().item()) > RELATIVE:
            at = tuple(torch.unravel_index(errors.argmax(), errors.shape))
            place = tuple(map(int, at))
            raise GraphError(
                f"{where}, element {place}: expected {expected[place].item():.9g}, got "
                f"{got[place].item():.9g} (relative error {worst:.1e}; "
                f"{int((errors > RELATIVE).sum())} of {errors.numel()} elements differ)"
            )

    def _outputs(self, state: _State) -> list[int]:
        return [state.numbers[value] for value in state.graph.outputs()]

    def _evaluated(self, graph: Graph, before: _State, trusted: bool = False) -> _State:
        """The state of a graph; only what is not known yet is evaluated.

        trusted: where a node agrees with nothing from before, the captured op that it ends with is
        what it should be.
        """
        numbers: dict[Value, int] = {}
        inputs = iter(self._inputs)
        batch = batch_of(graph, self._inputs)
        for node in graph.nodes():
            if node.op == OUTPUT:
                continue
            sources = tuple(numbers[value] for value in graph.inputs(node.name))
            key = _key(graph, node, sources)
            if key not in self._known:
                if node.op == INPUT:
                    results: Sequence[torch.Tensor] = [next(inputs)]
                elif node.op == CONSTANT:
                    results = [graph.tensors[node.name].detach()]
                else:
                    results = self._results(graph, node, sources)
                specs = zip(results, node.outputs, strict=True)
                results = [rows_of(result, spec, batch) for result, spec in specs]
                self._known[key] = self._numbers(results, sources, list(before.candidates(node)))
            if trusted:
                self._known[key] = tuple(self._trusted(n, node, before) for n in self._known[key])
            for index, number in enumerate(self._known[key]):
                numbers[Value(node.name, index)] = number
        return _State(graph.copy(), numbers)

    def _trusted(self, number: int, node: Node, before: _State) -> int:
        """The number, or that of what the node should be where it is a new one."""
        if number in before.numbers.values():
            return number
        made = self._tensors[number]
        candidates = ((old, self._tensors[old]) for old in before.candidates(node))
        return next((old for old, was in candidates if _are_alike(made, was)), number)

    def _results(
        self, graph: Graph, node: Node, sources: tuple[int, ...]
    ) -> Sequence[torch.Tensor]:
        tensors = tuple(map(self._tensor, sources))
        try:
            with torch.no_grad():
                return evaluate_node(node, tensors, graph, keep_dtype=True)
        except (RuntimeError, ValueError, IndexError, ConvloomError) as error:
            problem = f"{self._described(graph, node.name)} cannot be evaluated: {error}"
            raise GraphError(problem) from error

    def _numbers(
        self, results: Sequence[torch.Tensor], sources: tuple[int, ...], candidates: list[int]
    ) -> tuple[int, ...]:
        """A candidate's number for each result that agrees with it, and a new one for others."""
        scale = max(map(self._scale, sources), default=0.0) if candidates else 0.0
        numbers = []
        for result in results:
            number = next((n for n in candidates if self._agrees(result, n, scale)), None)
            if number is None:
                self._count += 1
                number = self._count
                self._tensors[number] = result
            numbers.append(number)
        return tuple(numbers)

    def _agrees(self, result: torch.Tensor, number: int, scale: float) -> bool:
        error = largest_error(result, self._tensor(number), scale)
        if error <= RELATIVE:
            self._error = max(self._error, error)
        return error <= RELATIVE

    def _described(self, graph: Graph, name: str) -> str:
        """A node, with the captured ops that it was made of and their module paths."""
        node = graph.node(name)
        shown = [
            f"{origin} in '{path}'" if (path := self._paths.get(origin)) else origin
            for origin in node.origins[:MOST_NAMES]
        ]
        if (left := len(node.origins) - MOST_NAMES) > 0:
            shown.append(f"{left} more")
        return f"%{name} ({node.op} of {', '.join(shown)})" if shown else f"%{name} ({node.op})"

    def _scale(self, number: int) -> float:
        if number not in self._scales:
            self._scales[number] = _rms(self._tensor(number))
        return self._scales[number]

    def _tensor(self, number: int) -> torch.Tensor:
        """A value in fp64, unless it is whole numbers."""
        tensor = self._tensors[number]
        return tensor.double() if tensor.is_floating_point() else tensor


def _drawn(graph: Graph, draw: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    specs = [node.spec for node in graph.graph_inputs()]
    return [draw(spec.at(min(spec.batch or BATCH, BATCH)), **given) for spec in specs]


@dataclass(frozen=True, eq=False)
class _Itself:
    """Something that equals itself alone, as a part of a key; it lives as long as the key."""

    thing: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _key(graph: Graph, node: Node, sources: tuple[int, ...]) -> tuple[Any, ...]:
    """What decides a node's results."""
    if node.op == INPUT:
        return INPUT, node.name
    if node.op == CONSTANT:
        return CONSTANT, _Itself(graph.tensors[node.name])
    attributes = _Itself(node.attributes) if node.op == TORCH else node.attributes
    return node.op, attributes, node.epilogue, node.prologue, sources


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one shape, and are both floats, whole numbers or booleans."""
    floats = one.is_floating_point() and other.is_floating_point()
    return one.shape == other.shape and (floats or one.dtype is other.dtype)


def _rms(tensor: torch.Tensor) -> float:
    """Of what is finite; looking for the rest takes longer than summing."""
    mean = tensor.double().square().mean()
    if not mean.isfinite():
        finite = tensor[tensor.isfinite()].double()
        mean = finite.square().sum() / max(finite.numel(), 1)
    return mean.sqrt().item()


def agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results of fp64 are the same but for roundings."""
    return largest_error(got, expected) <= RELATIVE


def largest_error(got: torch.Tensor, expected: torch.Tensor, scale: float = 0.0) -> float:
    """Of `relative_errors`; infinite for another shape."""
    if got.shape != expected.shape:
        return torch.inf
    return relative_errors(got, expected, scale).max().item() if got.numel() else 0.0


def relative_errors(got: torch.Tensor, expected: torch.Tensor, scale: float = 0.0) -> torch.Tensor:
    """Per element, relative to it, the rms and a trifle of `scale`; infinite where NaN and Inf are
    not the same, or a whole number is another one."""
    if not _are_alike(got, expected):
        return torch.full(expected.shape, torch.inf)
    same = (got == expected) | (got.isnan() & expected.isnan())
    if not expected.is_floating_point():
        return torch.where(same, 0.0, torch.inf)
    allowed = expected.abs() + _rms(expected) + CANCELLED * scale
    errors = ((got - expected).abs() / allowed).nan_to_num(torch.inf, torch.inf)
    return torch.where(same, 0.0, errors)


def _message(name: str, graph: Graph, error: Exception) -> str:
    rewrite = ""
    if isinstance(error, _CulpritError):
        rule, made, error = error.args
        rewrite = f"; rule {rule!r} made {made}"
    return (
        f"pass {name!r} changes what {graph.name} computes{rewrite}; seen at {error}. This is a "
        "defect of convloom: report it, and leave the pass (passes=) or the rule (forbid=) out"
    )
