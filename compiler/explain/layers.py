"""A layered drawing of a directed acyclic graph of boxes, wrapped into columns.

Four steps (K. Sugiyama, S. Tagawa, M. Toda, 1981): boxes get layers by longest paths; edges over
several layers pass through one bend per layer, shared by all edges of one source; the order within
layers follows the barycentres of neighbours, which removes most crossings; positions are as near to
the neighbours as the boxes' widths allow (a weighted least-squares problem that pooling adjacent
violators solves exactly). A network is a long chain: the layers are then cut into columns, where
few edges cross, so that the drawing has about the shape of a screen.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import networkx as nx

from ...errors import InvalidInputError

Key = tuple[str, int]
"""A box (its name, -1) or the bend of its edges in a layer (its name, layer)."""

LAYER_GAP, BOX_GAP, BEND_GAP, BEND_WIDTH = 44.0, 26.0, 14.0, 6.0
COLUMN_GAP, LANE = 90.0, 9.0
ASPECT = 1.45
"""Width to height of the part of a screen that shows the drawing."""
MOST_COLUMNS = 12
MOST_KEYS = 50_000
"""Boxes, and bends of edges that pass by layers: sorting out more takes longer than anybody waits.
"""
SWEEPS = 12


@dataclass(frozen=True)
class Box:
    """A box's place: its centre, and its size."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def top(self) -> float:
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height / 2


@dataclass(frozen=True)
class Drawing:
    """Boxes and, for every edge, an SVG path; the whole lies in (0, 0, width, height)."""

    boxes: Mapping[str, Box]
    paths: Mapping[tuple[str, str], str]
    width: float
    height: float


def draw(sizes: Mapping[str, tuple[float, float]], edges: Iterable[tuple[str, str]]) -> Drawing:
    """The drawing of boxes of the given (width, height); edges between them form no cycle.

    Raises: ValueError where they do; InvalidInputError where it is too large to be looked at.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(dict.fromkeys(edges))
    if not sizes:
        return Drawing({}, {}, 0.0, 0.0)
    layer = layers_of(graph)
    reach = (max((layer[after] for after in graph.succ[name]), default=0) - layer[name]
             for name in graph)  # fmt: skip
    if (keys := len(graph) + sum(max(length - 1, 0) for length in reach)) > MOST_KEYS:
        raise InvalidInputError(
            f"the picture would have {keys:,} boxes and bends of edges, expected at most "
            f"{MOST_KEYS:,}; look at the text or the JSON"
        )
    bent, rows = _rows(graph, layer)
    rows = _ordered(bent, rows)
    x = _positions(bent, rows, sizes)
    return _Sheet(graph, layer, rows, x, sizes).drawing()


def layers_of(graph: nx.DiGraph) -> dict[str, int]:
    """Layers by longest paths; a source stands right above its nearest reader."""
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError(f"the graph has a cycle: {nx.find_cycle(graph)}")
    layer: dict[str, int] = {}
    for name in nx.topological_sort(graph):
        layer[name] = max((layer[before] + 1 for before in graph.pred[name]), default=0)
    for name in graph:
        if not graph.pred[name] and graph.succ[name]:
            layer[name] = min(layer[after] for after in graph.succ[name]) - 1
    return layer


def _route(layer: Mapping[str, int], source: str, target: str) -> list[Key]:
    """The edge's stations: its source, a bend per layer between, its target."""
    bends = [(source, at) for at in range(layer[source] + 1, layer[target])]
    return [(source, -1), *bends, (target, -1)]


def _rows(graph: nx.DiGraph, layer: Mapping[str, int]) -> tuple[nx.DiGraph, list[list[Key]]]:
    """The graph of boxes and bends, and what is in each layer."""
    bent = nx.DiGraph()
    bent.add_nodes_from((name, -1) for name in graph)
    for source, target in graph.edges:
        nx.add_path(bent, _route(layer, source, target))
    rows: list[list[Key]] = [[] for _ in range(max(layer.values()) + 1)]
    # In the order of a depth-first walk, branches start out side by side.
    for key in nx.dfs_preorder_nodes(bent):
        rows[layer[key[0]] if key[1] < 0 else key[1]].append(key)
    return bent, rows


# The order within layers.


def _ordered(bent: nx.DiGraph, rows: list[list[Key]]) -> list[list[Key]]:
    best, fewest = rows, crossings(bent, rows)
    for sweep in range(SWEEPS):
        if fewest == 0:
            break
        rows = _swept(bent, rows, down=sweep % 2 == 0)
        count = crossings(bent, rows)
        if count < fewest:
            best, fewest = rows, count
    return best


def _swept(bent: nx.DiGraph, rows: list[list[Key]], down: bool) -> list[list[Key]]:
    """Rows sorted one after the other by the mean position of their neighbours in the last."""
    swept = [list(row) for row in rows]
    order = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
    for at in order:
        fixed = {key: place for place, key in enumerate(swept[at - 1 if down else at + 1])}
        near = bent.pred if down else bent.succ
        means = {}
        for place, key in enumerate(swept[at]):
            places = [fixed[other] for other in near[key] if other in fixed]
            means[key] = sum(places) / len(places) if places else float(place)
        swept[at].sort(key=means.__getitem__)
    return swept


def crossings(bent: nx.DiGraph, rows: Sequence[Sequence[Key]]) -> int:
    """How many pairs of edges between neighbouring rows cross."""
    count = 0
    for upper, lower in pairwise(rows):
        place = {key: at for at, key in enumerate(lower)}
        ends: list[int] = []
        for key in upper:
            targets = sorted(place[after] for after in bent.succ[key] if after in place)
            count += sum(len(ends) - bisect_right(ends, target) for target in targets)
            for target in targets:
                insort(ends, target)
    return count


# Positions.


def _positions(
    bent: nx.DiGraph, rows: Sequence[Sequence[Key]], sizes: Mapping[str, tuple[float, float]]
) -> dict[Key, float]:
    """The horizontal centre of every box and bend."""
    x = {key: 0.0 for row in rows for key in row}
    gaps = [_gaps(row, sizes) for row in rows]
    for row, apart in zip(rows, gaps, strict=True):
        middle = sum(apart) / 2
        for at, key in enumerate(row):
            x[key] = sum(apart[:at]) - middle
    for sweep in range(2 * SWEEPS):
        order = range(len(rows)) if sweep % 2 == 0 else range(len(rows) - 1, -1, -1)
        for at in order:
            wanted, weights = [], []
            for key in rows[at]:
                pulls = [*_pulls(bent.pred[key], key, x), *_pulls(bent.succ[key], key, x)]
                total = sum(weight for _, weight in pulls)
                wanted.append(sum(p * w for p, w in pulls) / total if pulls else x[key])
                weights.append(total or 0.1)
            for key, place in zip(rows[at], spread(wanted, weights, gaps[at]), strict=True):
                x[key] = place
    return x


def _pulls(near: Iterable[Key], key: Key, x: Mapping[Key, float]) -> list[tuple[float, float]]:
    """Where neighbours pull and how strongly: long edges should be straight, then chains of boxes;
    where a long edge ends matters least."""
    return [(x[other], 12.0 if (other[1] >= 0) == (key[1] >= 0) else 1.0) for other in near]


def _gaps(row: Sequence[Key], sizes: Mapping[str, tuple[float, float]]) -> list[float]:
    """The least distances between the centres of neighbours in a row."""
    gaps = []
    for left, right in pairwise(row):
        bends = (left[1] >= 0) + (right[1] >= 0)
        gap = BEND_GAP if bends == 2 else BOX_GAP
        gaps.append((_width(left, sizes) + _width(right, sizes)) / 2 + gap)
    return gaps


def _width(key: Key, sizes: Mapping[str, tuple[float, float]]) -> float:
    return sizes[key[0]][0] if key[1] < 0 else BEND_WIDTH


def spread(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones, by weighted squares, that keep the gaps between them.

    Pools adjacent violators of the order (isotonic regression).
    """
    offsets = [*accumulate(gaps, initial=0.0)]
    pools: list[tuple[float, float, int]] = []
    for place, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, count = place - offset, weight, 1
        while pools and pools[-1][0] >= mean:
            other, more, members = pools.pop()
            mean = (mean * total + other * more) / (total + more)
            total, count = total + more, count + members
        pools.append((mean, total, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


# Columns.


class _Sheet:
    """Layers cut into columns, and what is drawn there."""

    def __init__(
        self,
        graph: nx.DiGraph,
        layer: Mapping[str, int],
        rows: Sequence[Sequence[Key]],
        x: Mapping[Key, float],
        sizes: Mapping[str, tuple[float, float]],
    ) -> None:
        self.graph, self.layer, self.rows, self.sizes = graph, layer, rows, sizes
        self.heights = [
            max((sizes[name][1] for name, bend in row if bend < 0), default=0.0) for row in rows
        ]
        self.column = [0] * len(rows)
        self.x: dict[Key, float] = {}
        best = 0.0
        for count in range(1, min(MOST_COLUMNS, len(rows)) + 1):
            column = self._cut(count)
            self._arrange(column, x)
            scale = min(ASPECT / self.width, 1.0 / self.height)
            if scale > best:
                best, self.column = scale, column
        self._arrange(self.column, x)

    def _cut(self, count: int) -> list[int]:
        """The column of every layer: cut where few edges cross, in columns of similar height."""
        tops = [*accumulate((height + LAYER_GAP for height in self.heights), initial=0.0)]
        crossing = [len({name for name, bend in row if bend >= 0 or self.graph.succ[name]})
                    for row in self.rows]  # fmt: skip
        column, start = [0] * len(self.rows), 0
        for at in range(1, count):
            ideal = tops[start] + (tops[-1] - tops[start]) / (count - at + 1)
            slack = 0.35 * tops[-1] / count
            near = [cut for cut in range(start + 1, len(tops) - 1)
                    if abs(tops[cut] - ideal) <= slack]  # fmt: skip
            if not near:
                break
            ranked = [(crossing[cut - 1], abs(tops[cut] - ideal), cut) for cut in near]
            start = min(ranked)[2]
            column[start:] = [at] * (len(column) - start)
        return column

    def _arrange(self, column: Sequence[int], x: Mapping[Key, float]) -> None:
        """Places everything for a choice of columns."""
        self.lefts, self.y, left = [], [], 0.0
        for number in range(column[-1] + 1):
            own = [at for at, place in enumerate(column) if place == number]
            keys = [key for at in own for key in self.rows[at]]
            least = min(x[key] - _width(key, self.sizes) / 2 for key in keys)
            most = max(x[key] + _width(key, self.sizes) / 2 for key in keys)
            self.lefts.append(left)
            self.x |= {key: x[key] - least + left for key in keys}
            top = 0.0
            for at in own:
                self.y.append(top + self.heights[at] / 2)
                top += self.heights[at] + LAYER_GAP
            left += most - least + COLUMN_GAP
        self.width = left - COLUMN_GAP
        bottoms = [y + height / 2 for y, height in zip(self.y, self.heights, strict=True)]
        cuts = [at for at in range(len(column) - 1) if column[at + 1] != column[at]]
        lanes = max((len(self.rows[at]) for at in cuts), default=0)
        self.margin = lanes * LANE + 16.0 if cuts else 0.0
        self.y = [y + self.margin for y in self.y]
        self.floor = max(bottoms) + self.margin
        self.height = self.floor + self.margin

    def drawing(self) -> Drawing:
        boxes = {
            name: Box(self.x[name, -1], self.y[at], *self.sizes[name])
            for at, row in enumerate(self.rows)
            for name, bend in row
            if bend < 0
        }
        paths = {edge: self._path(edge, boxes) for edge in self.graph.edges}
        return Drawing(boxes, paths, self.width, self.height)

    def _path(self, edge: tuple[str, str], boxes: Mapping[str, Box]) -> str:
        source, target = edge
        stations = _route(self.layer, source, target)
        x, y = self.x[stations[0]], boxes[source].bottom
        path = [f"M{x:.1f} {y:.1f}"]
        at = self.layer[source]
        for key in stations[1:]:
            over = self.x[key]
            below = boxes[target].top if key[1] < 0 else self.y[at + 1] - self.heights[at + 1] / 2
            if self.column[at + 1] == self.column[at]:
                half = min((below - y) / 2, LAYER_GAP)
                path.append(f"C{x:.1f} {y + half:.1f} {over:.1f} {below - half:.1f} "
                            f"{over:.1f} {below:.1f}")  # fmt: skip
            else:
                path.append(self._to_next_column(x, over, below, at, source))
            x, y, at = over, below, at + 1
            if key[1] >= 0:
                y = self.y[at] + self.heights[at] / 2
                path.append(f"V{y:.1f}")
        return "".join(path)

    def _to_next_column(self, x: float, over: float, below: float, at: int, source: str) -> str:
        """Down under the column, up through the gutter, and down again from above."""
        names = [key[0] for key in self.rows[at]]
        lane = names.index(source) if source in names else 0
        low, high = self.floor + 10.0 + lane * LANE, self.margin - 10.0 - lane * LANE
        gutter = self.lefts[self.column[at + 1]] - COLUMN_GAP / 2 + (lane - 1) * LANE
        corners = [(x, low), (gutter, low), (gutter, high), (over, high), (over, below)]
        return rounded((x, low - 12.0), corners)


def rounded(start: tuple[float, float], corners: Sequence[tuple[float, float]]) -> str:
    """Straight lines through corners, which are rounded."""
    last = complex(*start)
    path = [f"L{_numbers(last)}"]
    for corner, after in pairwise(complex(*corner) for corner in corners):
        radius = min(8.0, abs(last - corner) / 2, abs(after - corner) / 2)
        enter, leave = (
            corner + (end - corner) * (radius / (abs(end - corner) or 1.0)) for end in (last, after)
        )
        path.append(f"L{_numbers(enter)}Q{_numbers(corner)} {_numbers(leave)}")
        last = leave
    return "".join([*path, f"L{_numbers(complex(*corners[-1]))}"])


def _numbers(point: complex) -> str:
    return f"{point.real:.1f} {point.imag:.1f}"
