"""The picture folded by module: one drawing for each module, in which its sub-modules are boxes.

The whole network of hundreds of kernels is a wall of boxes; the top level has a dozen, and every
box opens into the next level. All levels are laid out here, by `layers.draw`, and only their
positions are written: the page draws kernels as copies of those in the whole picture. A layout
library in the page (elkjs) would unfold in place, but adds 1.6 MB to each, takes ten times as long,
and draws no SVG without a browser: docs/how/index.md compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import networkx as nx

from .account import Account
from .layers import draw

LEVEL_SIZE = (200.0, 78.0)
OUTSIDE_SIZE = (150.0, 24.0)
FEW = 12
"""Places that a level shows without folding the modules inside it."""
DEEPEST = 8
"""Levels inside each other; networks have four. A file of anybody's may name more modules."""


@dataclass(frozen=True)
class Level:
    """One drawing. name: of the level, a module path (with "#2" and so on for the further parts of
    a module whose kernels others stand between); parent: the level above, None at the top.

    places: inside, in order of the plan. boxes: name, kind ("place", "level" or "outside"), and
    left, top, width and height. paths: from, to, and an SVG path.
    """

    name: str
    parent: str | None
    places: tuple[str, ...]
    width: float
    height: float
    boxes: tuple[tuple[str, str, float, float, float, float], ...]
    paths: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers of pixels are rounded."""
        rounded = [[*box[:2], *(round(value, 1) for value in box[2:])] for box in self.boxes]
        size = {"width": round(self.width, 1), "height": round(self.height, 1)}
        return {"name": self.name, "parent": self.parent, "places": self.places, **size,
                "boxes": rounded, "paths": self.paths}  # fmt: skip


def levels(account: Account, sizes: Mapping[str, tuple[float, float]]) -> list[Level]:
    """The levels from the top, each before those inside it.

    sizes: width and height of the boxes of places.
    """
    net = nx.DiGraph()
    net.add_nodes_from(place.name for place in account.places)
    net.add_edges_from(account.edges)
    order = {name: at for at, name in enumerate(net)}
    names = tuple(nx.lexicographical_topological_sort(net, key=order.__getitem__))
    paths = {place.name: tuple(filter(None, place.module_path.split(".")))
             for place in account.places}  # fmt: skip
    return list(_Folder(net, paths, sizes).levels("", (), 0, names))


@dataclass(frozen=True)
class _Folder:
    """net: the graph of places; paths: their module paths, in parts; used: names of levels."""

    net: nx.DiGraph
    paths: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, tuple[float, float]]
    used: set[str] = field(default_factory=set)

    def levels(
        self, name: str, above: tuple[str, ...], depth: int, places: tuple[str, ...]
    ) -> Iterator[Level]:
        """The level of these places, in topological order, whose paths agree in `depth` parts, and
        those inside it. above: the names of the levels around it."""
        while len({self.paths[place][: depth + 1] for place in places}) == 1 and all(
            len(self.paths[place]) > depth for place in places
        ):
            depth += 1
        folds = len(places) > FEW and len(above) < DEEPEST
        box_of = self._boxes(places, depth) if folds else {place: place for place in places}
        inside: dict[str, list[str]] = {}
        for place in places:
            inside.setdefault(box_of[place], []).append(place)
        kinds = {box: "place" if box in self.net else "level" for box in inside}
        edges = []
        for source, target in chain(self.net.in_edges(places), self.net.out_edges(places)):
            ends = box_of.get(source, source), box_of.get(target, target)
            if ends[0] != ends[1]:
                edges.append(ends)
                kinds |= {end: "outside" for end in ends if end not in kinds}
        fixed = {"level": LEVEL_SIZE, "outside": OUTSIDE_SIZE}
        sizes = {box: fixed.get(kind) or self.sizes[box] for box, kind in kinds.items()}
        drawing = draw(sizes, edges)
        boxes = tuple(
            (at, kinds[at], box.left, box.top, box.width, box.height)
            for at, box in drawing.boxes.items()
        )
        paths = tuple((source, target, path) for (source, target), path in drawing.paths.items())
        parent = above[-1] if above else None
        yield Level(name, parent, places, drawing.width, drawing.height, boxes, paths)
        for box, members in inside.items():
            if kinds[box] == "level":
                yield from self.levels(box, (*above, name), depth + 1, tuple(members))

    def _boxes(self, places: tuple[str, ...], depth: int) -> dict[str, str]:
        """The box of each place: its own, or that of its module.

        A module becomes several boxes where others stand between its kernels: boxes, too, must
        follow each other in no circle.
        """
        boxes: nx.DiGraph = nx.DiGraph()
        latest: dict[tuple[str, ...], int] = {}
        box_of: dict[str, int] = {}
        for place in places:
            path = self.paths[place][: depth + 1]
            sources = {box_of[source] for source in self.net.pred[place] if source in box_of}
            box = latest.get(path) if len(path) > depth else None
            if box is None or any(nx.has_path(boxes, box, other) for other in sources - {box}):
                box = len(boxes)
            if len(path) > depth:
                latest[path] = box
            box_of[place] = box
            boxes.add_node(box)
            boxes.add_edges_from((source, box) for source in sources - {box})
        members: dict[int, list[str]] = {}
        for place, box in box_of.items():
            members.setdefault(box, []).append(place)
        names = {
            box: inside[0] if len(inside) == 1 else self._name(self.paths[inside[0]][: depth + 1])
            for box, inside in members.items()
        }
        return {place: names[box] for place, box in box_of.items()}

    def _name(self, path: tuple[str, ...]) -> str:
        """A level's name, which no other level and no place has."""
        module = ".".join(path)
        parts = (f"{module}#{part}" for part in count(1))
        name = next(name for name in parts if name not in self.used and name not in self.net)
        self.used.add(name)
        return name
