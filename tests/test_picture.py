"""Pictures of the ledger: the layout, and that what is drawn is whole, readable and escaped."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import networkx as nx
import pytest
from convloom.compiler.explain import account as acc
from convloom.compiler.explain import picture
from convloom.compiler.explain.account import Account
from convloom.compiler.explain.layers import Drawing, crossings, draw, layers_of, spread
from hypothesis import given
from hypothesis import strategies as st

from . import test_ledger as ledgers
from .nets import Made
from .test_ledger import account_of, exporting_once, small_zoo

__all__ = ["exporting_once"]
NETS = (ledgers.residual, ledgers.branches, ledgers.composite, small_zoo("squeezenet1_1"))
every_net = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
SVG = "{http://www.w3.org/2000/svg}"


# The layout.


@st.composite
def dags(draw: st.DrawFn) -> tuple[dict[str, tuple[float, float]], list[tuple[str, str]]]:
    """Boxes of random sizes, and edges from earlier to later ones."""
    count = draw(st.integers(1, 24))
    sides = st.floats(10.0, 300.0)
    sizes = {f"n{at}": draw(st.tuples(sides, sides)) for at in range(count)}
    pairs = [(f"n{a}", f"n{b}") for b in range(count) for a in range(max(0, b - 6), b)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=40)) if pairs else []
    return sizes, edges


def boxes_overlap(drawing: Drawing) -> list[tuple[str, str]]:
    boxes = list(drawing.boxes.items())
    return [
        (one, other)
        for at, (one, a) in enumerate(boxes)
        for other, b in boxes[:at]
        if abs(a.x - b.x) < (a.width + b.width) / 2 - 0.01
        and abs(a.y - b.y) < (a.height + b.height) / 2 - 0.01
    ]


def points(path: str) -> list[tuple[float, float]]:
    """The points of an SVG path of absolute commands, V included."""
    found: list[tuple[float, float]] = []
    for command, numbers in re.findall(r"([MLCQV])([-\d. ]+)", path):
        values = [float(number) for number in numbers.split()]
        if command == "V":
            found.append((found[-1][0], values[0]))
        else:
            found += list(zip(values[::2], values[1::2], strict=True))
    return found


@given(dags())
def test_boxes_do_not_overlap_and_edges_join_them(graph: tuple[dict, list]) -> None:
    sizes, edges = graph
    drawing = draw(sizes, edges)
    assert set(drawing.boxes) == set(sizes) and set(drawing.paths) == set(edges)
    assert not boxes_overlap(drawing)
    for box in drawing.boxes.values():
        assert box.left >= -0.01 and box.left + box.width <= drawing.width + 0.01
        assert box.top >= -0.01 and box.bottom <= drawing.height + 0.01
    for (source, target), path in drawing.paths.items():
        track = points(path)
        start, end = drawing.boxes[source], drawing.boxes[target]
        assert track[0] == pytest.approx((start.x, start.bottom), abs=0.1)
        assert track[-1] == pytest.approx((end.x, end.top), abs=0.1)
        assert min(y for _, y in track) >= -0.1 and max(y for _, y in track) <= drawing.height + 0.1


@given(dags())
def test_layers_lead_downwards(graph: tuple[dict, list]) -> None:
    net = nx.DiGraph(graph[1])
    net.add_nodes_from(graph[0])
    layer = layers_of(net)
    assert min(layer.values()) == 0
    assert all(layer[source] < layer[target] for source, target in net.edges)


def test_a_cycle_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="cycle"):
        draw({"a": (1, 1), "b": (1, 1)}, [("a", "b"), ("b", "a")])


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw({}, []) == Drawing({}, {}, 0.0, 0.0)


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(0.1, 5), st.floats(0, 20)), min_size=1,
             max_size=8),
    st.lists(st.floats(-3, 3), min_size=8, max_size=8),
)  # fmt: skip
def test_positions_keep_their_gaps_and_are_the_nearest(
    rows: list[tuple[float, float, float]], moves: list[float]
) -> None:
    wanted, weights, gaps = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows][1:]
    places = spread(wanted, weights, gaps)

    def keeps(at: list[float]) -> bool:
        return all(b - a >= gap - 1e-6 for (a, b), gap in zip(pairwise(at), gaps, strict=True))

    def cost(at: list[float]) -> float:
        return sum(w * (x - y) ** 2 for x, y, w in zip(at, wanted, weights, strict=True))

    assert keeps(places)
    other = [place + move for place, move in zip(places, moves, strict=False)]
    assert not keeps(other) or cost(places) <= cost(other) + 1e-6


def test_branches_stand_side_by_side_without_crossings() -> None:
    names = [f"{branch}{step}" for branch in "abcd" for step in range(3)]
    edges = [("top", f"{b}0") for b in "dbca"] + [(f"{b}2", "end") for b in "acbd"]
    edges += [(f"{b}{s}", f"{b}{s + 1}") for b in "abcd" for s in range(2)]
    drawing = draw(dict.fromkeys(["top", *names, "end"], (60.0, 40.0)), edges)
    order = [sorted("abcd", key=lambda b, s=s: drawing.boxes[f"{b}{s}"].x) for s in range(3)]
    assert order[0] == order[1] == order[2]
    for branch in "abcd":
        xs = [drawing.boxes[f"{branch}{step}"].x for step in range(3)]
        assert max(xs) - min(xs) < 1.0, "each branch is a straight line"


def test_crossings_are_counted() -> None:
    rows = [[("a", -1), ("b", -1)], [("c", -1), ("d", -1)]]
    net = nx.DiGraph([(("a", -1), ("d", -1)), (("b", -1), ("c", -1))])
    assert crossings(net, rows) == 1
    assert crossings(net, [rows[0], rows[1][::-1]]) == 0


def test_a_long_chain_is_cut_into_columns() -> None:
    names = [f"n{at}" for at in range(60)]
    edges = list(pairwise(names))
    drawing = draw(dict.fromkeys(names, (150.0, 60.0)), edges)
    assert 0.7 < drawing.width / drawing.height < 2.5
    assert len({round(box.x) for box in drawing.boxes.values()}) >= 4


# The picture.


class Structure(HTMLParser):
    """Elements of a page, with their attributes; every one must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ledger = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][1].get("id") == "ledger":
            self.ledger += data


def structure_of(page: str) -> Structure:
    found = Structure()
    found.feed(page)
    found.close()
    assert not found.open, "every element is closed"
    return found


def drawn(structure: Structure, attribute: str) -> Counter[str]:
    return Counter(a[attribute] for _, a in structure.elements if attribute in a)


def assert_whole(structure: Structure, account: Account) -> None:
    """Every captured node and every kernel is drawn exactly once."""
    assert drawn(structure, "data-node") == Counter(r.node for r in account.nodes)
    assert drawn(structure, "data-kernel") == Counter(p.name for p in account.kernels)
    others = Counter(p.name for p in account.places) - drawn(structure, "data-kernel")
    assert drawn(structure, "data-place") == others


@every_net
def test_the_page_is_whole_and_needs_nothing_else(net: Callable[[], Made]) -> None:
    account = account_of(net)
    page = picture.to_html(account)
    structure = structure_of(page)
    assert_whole(structure, account)
    data = json.loads(structure.ledger)
    assert acc.from_json(data, "page") == account
    scripts = page.replace(structure.ledger, "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(", scripts)
    assert "default-src 'none'" in page, "the browser refuses whatever the page does not bring"
    for tag, attributes in structure.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "image", "use", "base")
        assert not {"src", "href", "xlink:href", "srcset"} & set(attributes)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert not re.search(r"\{\{\w+\}\}", page), "every part has been filled in"


@every_net
def test_the_drawing_is_a_file_of_its_own(net: Callable[[], Made]) -> None:
    account = account_of(net)
    svg = picture.to_svg(account)
    root = ElementTree.fromstring(svg.encode())
    assert root.tag == f"{SVG}svg"
    assert svg.count("http") == 1, "the name of its own language only"
    tips = [title.text or "" for title in root.iter(f"{SVG}title")]
    for record in account.nodes:
        assert any(record.op in tip and f"-> {record.kernel}" in tip for tip in tips)
    assert any("us modelled; not measured" in tip for tip in tips)
    rules = {rule for record in account.nodes for rule in record.rules}
    assert all(any(rule in tip for tip in tips) for rule in rules)


@every_net
def test_texts_fit_their_boxes(net: Callable[[], Made]) -> None:
    root = ElementTree.fromstring(picture.to_svg(account_of(net)).encode())
    sizes = {"title": 13.0, "figures": 10.5, None: 11.0}
    for place in (g for g in root.iter(f"{SVG}g") if "place" in g.get("class", "").split()):
        box = place.find(f"{SVG}rect")
        width, height = float(box.get("width")), float(box.get("height"))
        lines = []
        for text in place.iter(f"{SVG}text"):
            if text.get("class") == "far":
                size = float(text.get("style").removeprefix("font-size:").removesuffix("px"))
                words = [span.text for span in text]
                assert max(map(len, words)) * size * 0.602 <= width
                assert len(words) * size <= height
                continue
            wide = len(text.text or "") * sizes[text.get("class")] * 0.602
            assert float(text.get("x")) + wide <= width, text.text
            lines.append(float(text.get("y")))
        assert all(b - a >= 11.0 for a, b in pairwise(lines)) and lines[-1] < height


NASTY = "<b>&\"'</script><!--]]>{{DATA}}"


def test_text_is_escaped() -> None:
    base = account_of(ledgers.leaky)
    refused = tuple(replace(r, reason=NASTY, label=NASTY) for r in base.nodes[-1].refused)
    renamed = {record.node: f"{NASTY}{at}" for at, record in enumerate(base.nodes)}
    nodes = tuple(
        replace(r, node=renamed[r.node], op=NASTY, module_path=NASTY, rules=(NASTY,),
                refused=refused)
        for r in base.nodes
    )  # fmt: skip
    places = tuple(
        replace(p, nodes=tuple(map(renamed.get, p.nodes)), op=NASTY, computes=NASTY, config=NASTY)
        for p in base.places
    )
    account = replace(base, model=NASTY, machine=NASTY, nodes=nodes, places=places)
    structure = structure_of(picture.to_html(account))
    assert_whole(structure, account)
    assert acc.from_json(json.loads(structure.ledger), "page") == account
    assert not any(tag == "b" for tag, _ in structure.elements)
    root = ElementTree.fromstring(picture.to_svg(account).encode())
    assert {g.get("data-node") for g in root.iter(f"{SVG}g")} - {None} == set(renamed.values())


def test_measured_times_are_drawn_as_such() -> None:
    ledger = ledgers.ledger_of(ledgers.leaky)
    step = ledger.plan.steps[0].name
    svg = picture.to_svg(ledger.with_measured({step: 77.5}, "a GPU").account())
    assert "77.5 us measured, " in svg and "measured times are from a GPU" in svg
    assert "nothing was measured" in picture.to_svg(ledger.account())


@pytest.mark.parametrize("text", ["conv1", "layer1.0.downsample.conv"])
def test_long_names_lose_their_middle(text: str) -> None:
    found = picture.shortened(text, 12)
    assert len(found) <= 12 and found[-5:] == text[-5:] and (found == text or "…" in found)
