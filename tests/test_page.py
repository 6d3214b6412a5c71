"""The ledger's page: how it folds by module, and what it does in a browser (where there is one)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from convloom.compiler.explain import account as acc
from convloom.compiler.explain import picture
from convloom.compiler.explain.account import Account, KernelNode, Peaks, Record, Refusal, Totals
from convloom.compiler.explain.folding import DEEPEST, FEW, levels
from convloom.compiler.graph.ledger import Event
from convloom.kernels.contract.cost_model import Resources
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_hostile_text import attacked

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update",
             "--disable-sync")  # fmt: skip


def place(name: str, path: str, **fields: Any) -> KernelNode:
    return KernelNode(name, acc.KERNEL, "convolution", "conv2d", "conv2d", path, **fields)


def account_of(
    paths: dict[str, str], edges: list[tuple[str, str]], measured: bool = False
) -> Account:
    """An account of kernels by name and module path, of one op each; the times count up."""
    places, nodes = [], []
    for at, (name, path) in enumerate(paths.items(), 1):
        times = {"modelled": acc.modelled(float(at)), "bound": "memory"}
        if measured:
            times["measured"] = acc.Time(2.0 * at, acc.MEASURED)
        places.append(place(name, path, nodes=(f"op_{at}",), launches=1, size_bytes=at * 10**6,
                            config="warps=4", flops=at * 10**9, **times))  # fmt: skip
        refused = (Refusal("conv pool => one", "conv-pool", f"op_{at} is wide"),)
        nodes.append(
            Record(f"op_{at}", "conv2d", path, name, name, ("fold",), refused, 2 * at * 10**6,
                   at * 10**6, 3, 2, acc.modelled(3.0 * at), acc.modelled(float(at)))
        )  # fmt: skip
    count = len(places)
    total = float(sum(range(1, count + 1)))
    events = tuple(
        Event("conv pool => one", (f"op_{at}", f"op_{at + 1}"), False, f"op_{at} is wide",
              label="conv-pool") for at in range(1, count)
    )  # fmt: skip
    return Account(
        "net", "cuda:sm_90", "float16", 1, "H200 (sm_90)", Peaks(800.0, 4000.0, 8000.0), "",
        Totals(3 * count, count, 2 * 10**9, 10**9, acc.modelled(3 * total),
               acc.modelled(total), acc.UNKNOWN, 0),
        tuple(nodes), tuple(places), tuple(edges), events,
    )  # fmt: skip


def chain(stages: int = 4, blocks: int = 3, convs: int = 4) -> Account:
    """A chain of kernels: stage0.block0.conv0 and so on."""
    paths = {
        f"k{s}{b}{c}": f"stage{s}.block{b}.conv{c}"
        for s in range(stages)
        for b in range(blocks)
        for c in range(convs)
    }
    names = list(paths)
    return account_of(paths, list(pairwise(names)))


def sizes(account: Account) -> dict[str, tuple[float, float]]:
    return dict.fromkeys((place.name for place in account.places), (100.0, 40.0))


# Folding.


@st.composite
def accounts(draw: st.DrawFn) -> Account:
    """Random graphs of kernels with random paths, of names that look like those of levels too."""
    count = draw(st.integers(1, 40))
    parts = st.lists(st.sampled_from(["a", "b", "a#1"]), max_size=4).map(".".join)
    names = draw(st.permutations([*(f"n{at}" for at in range(count - 1)), "a#1"]))
    pairs = [(a, b) for at, b in enumerate(names) for a in names[max(0, at - 4) : at]]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=60, unique=True)) if pairs else []
    return account_of({name: draw(parts) for name in names}, edges)


@settings(max_examples=25, deadline=None)
@given(accounts())
def test_every_kernel_has_one_box_and_no_edge_is_lost(account: Account) -> None:
    found = levels(account, sizes(account))
    assert found[0].name == "" and found[0].parent is None
    assert len({level.name for level in found}) == len(found)
    kernels = Counter(box[0] for level in found for box in level.boxes if box[1] == "place")
    assert kernels == Counter(place.name for place in account.places)
    by_name = {level.name: level for level in found}
    assert sorted(found[0].places) == sorted(kernels)
    for level in found:
        box_of = {name: name for name in level.places}
        for name, kind, *_ in level.boxes:
            if kind == "level":
                assert by_name[name].parent == level.name
                box_of |= dict.fromkeys(by_name[name].places, name)
        assert set(box_of) == set(level.places), "a box inside holds what its level holds"
        ends = {(box_of.get(a, a), box_of.get(b, b)) for a, b in account.edges
                if a in box_of or b in box_of}  # fmt: skip
        drawn = {path[:2] for path in level.paths}
        assert drawn == {(a, b) for a, b in ends if a != b}
        assert nx.is_directed_acyclic_graph(nx.DiGraph(drawn))


def test_a_module_with_others_between_its_kernels_becomes_several_boxes() -> None:
    halves = {f"k{at}": f"{'ab'[at // 5 % 2]}.conv{at}" for at in range(4 * 5)}
    names = list(halves)
    account = account_of(halves, list(pairwise(names)))
    top = levels(account, sizes(account))[0]
    assert [box[:2] for box in top.boxes] == [
        ("a#1", "level"), ("b#1", "level"), ("a#2", "level"), ("b#2", "level"),
    ]  # fmt: skip


def test_levels_follow_the_modules() -> None:
    account = chain(convs=FEW + 1)
    parents = {level.name: level.parent for level in levels(account, sizes(account))}
    assert parents["stage1#1"] == "" and parents["stage1.block2#1"] == "stage1#1"
    assert len(parents) == 1 + 4 + 4 * 3
    assert len(levels(chain(1, 1, FEW), sizes(chain(1, 1, FEW)))) == 1, "few need no folding"


def test_modules_inside_each_other_end_somewhere() -> None:
    deep = {f"k{at}": ".".join(["m"] * at) for at in range(200)}
    names = list(deep)
    account = account_of(deep, list(pairwise(names)))
    assert len(levels(account, sizes(account))) <= DEEPEST + 1


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright (extra: browser)")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM}")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(ARGUMENTS))
        yield started
        started.close()


class Page:
    """A page in the browser, what it complained of, and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, html: str) -> None:
        path.write_text(html, encoding="utf-8")
        self.path, self.complaints, self.asked = path, [], []
        self.tab = browser.new_page(viewport={"width": 1280, "height": 800})
        self.tab.set_default_timeout(10_000)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.tab.goto(path.as_uri())

    def close(self) -> None:
        self.tab.close()
        assert not self.complaints
        assert self.asked == [self.path.as_uri()], "nothing but the file itself is read"

    def text(self, selector: str) -> str:
        return str(self.tab.inner_text(selector))

    def count(self, selector: str) -> int:
        return int(self.tab.locator(selector).count())

    @property
    def address(self) -> str:
        return str(self.tab.evaluate("decodeURIComponent(location.hash)"))


CODE = (picture.KernelCode("k000", "k000", "# own", "def kernel():\n    pass",
                           Resources(96, 0, 49_152)),)  # fmt: skip


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Page]:
    account = chain().with_measured({"k000": 2.5}, "a GPU")
    opened = Page(browser, tmp_path / "net.html", picture.to_html(account, CODE))
    yield opened
    opened.close()


def test_the_graph_opens_by_module_and_leads_to_a_kernel(page: Page) -> None:
    tab = page.tab
    assert page.count("#canvas .level") == 4 and page.count("#canvas .place") == 0
    assert "144 \N{RIGHTWARDS ARROW} 48 launches" in page.text("#summary")
    tab.click("[data-level='stage3#1']")
    assert page.count("#canvas .place") == 12 and page.address == "#module=stage3#1"
    tab.click("[data-kernel=k312] .title")
    assert page.text("#panel h2") == "k312" and page.address == "#kernel=k312&module=stage3#1"
    assert "43.0 us modelled" in page.text("#panel") and "43.0 GFLOP" in page.text("#panel")
    assert page.count("#canvas .chosen") == 1 and page.count("#canvas .edge.near") == 2
    tab.keyboard.press("j")
    assert page.text("#panel h2") == "k313"
    tab.keyboard.press("u")
    assert page.count("#canvas .level") == 4
    tab.keyboard.press("a")
    assert page.count("#canvas .place") == 48
    hottest = "document.querySelector('[data-kernel=k323]').style.getPropertyValue('--share')"
    assert tab.evaluate(hottest) == "100.0%"
    assert "bytes" not in page.text("#legend")
    tab.keyboard.press("c")
    assert page.text("#legend") == "convolution"


def test_an_address_opens_at_a_kernel_of_which_the_code_can_be_copied(page: Page) -> None:
    tab = page.tab
    tab.evaluate("location.hash = '#view=roofline&kernel=k000'")
    tab.wait_for_selector("#panel h2:text-is('k000')")
    assert page.count("#roofline .point.chosen") == 1 and page.count("#roofline .measured") == 1
    assert page.count("#roofline [data-point]") == 48
    told = page.text("#panel")
    assert "96 registers per thread, 0 bytes spilled, 49.2 kB" in told
    assert "2.5 us measured" in told and "1000.0 FLOP per byte" in told
    tab.click("#panel summary")
    tab.evaluate("navigator.clipboard.writeText = text => { window.copied = text; }")
    tab.click("#panel button.copy")
    assert tab.evaluate("window.copied") == "# own\ndef kernel():\n    pass"
    tab.evaluate("location.hash = '#kernel=nowhere'")
    tab.wait_for_selector("#panel h2:text-is('The whole network')")


def test_kernels_are_sorted_and_searched(page: Page) -> None:
    tab = page.tab
    tab.keyboard.press("2")
    first = "#kernels tbody tr:nth-child(1) td:nth-child(2)"
    assert page.text(first) == "k323", "the costliest first"
    tab.click("#kernels th button:text-is('kernel')")
    assert page.text(first) == "k000"
    tab.click("#kernels th button:text-is('kernel')")
    assert page.text(first) == "k323" and page.count("th[aria-sort=descending]") == 1
    tab.keyboard.press("/")
    tab.keyboard.type("stage1.block2")
    assert page.count("#kernels tbody tr:visible") == 4 and page.text("#hits") == "8 found"
    tab.keyboard.press("Enter")
    assert "stage1.block2.conv0" in page.text("#panel") and "find=" in page.address
    tab.keyboard.press("Escape")
    assert page.count("#kernels tbody tr:visible") == 48


def test_modules_fold_and_compare_alone_with_planned(page: Page) -> None:
    tab = page.tab
    tab.keyboard.press("3")
    assert page.count("#modules tbody tr") == 4
    tab.click("#modules button:text-is('stage0')")
    assert page.count("#modules tbody tr") == 4 + 3
    tab.click("#modules button:text-is('block1')")
    row = page.text("#modules tr[data-path='stage0.block1']").split()
    # Four ops, kernels 5 to 8: 3 launches alone and 1 planned each, 26 us planned.
    assert row[-8:] == [
        "\N{BLACK DOWN-POINTING SMALL TRIANGLE}block1",
        "4",
        "12",
        "4",
        "78.0",
        "us",
        "26.0",
        "us",
    ]
    tab.click("#modules button:text-is('stage0')")
    assert page.count("#modules tbody tr") == 4


def test_refusals_lead_to_their_ops(page: Page) -> None:
    tab = page.tab
    tab.click("#tab-refusals")
    tab.click("#refusals summary")
    assert page.text("#refusals .count") == "47 x" and page.count("#refusals li") == 47
    tab.click("#refusals li:nth-child(5) div button")
    assert page.text("#panel h2") == "conv2d" and page.address.startswith("#node=op_5&")
    assert "conv-pool: op_5 is wide" in page.text("#panel")
    tab.click("#refusals li:nth-child(5) .nodes button:nth-child(2)")
    assert "captured as op_6" in page.text("#panel")
    tab.click("#panel button:text-is('k011')")
    assert page.text("#panel h2") == "k011"


def test_keys_are_listed_and_tabs_follow_arrows(page: Page) -> None:
    tab = page.tab
    tab.keyboard.press("?")
    assert "next kernel" in page.text("dialog[open]")
    tab.keyboard.press("Escape")
    assert page.count("dialog[open]") == 0
    tab.focus("#tab-graph")
    tab.keyboard.press("ArrowRight")
    assert tab.get_attribute("#tab-kernels", "aria-selected") == "true"
    assert page.count("[role=tabpanel]:visible") == 1
    tab.keyboard.press("t")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_plan_for_the_cpu_shows_bytes_and_no_times(browser: Any, tmp_path: Path) -> None:
    account = replace(chain(1, 1, 3), target="interpreter", machine="", peaks=None)
    opened = Page(browser, tmp_path / "cpu.html", picture.to_html(account))
    for view in "2345":
        opened.tab.keyboard.press(view)
        assert " us" not in opened.text("main")
    assert "needs a plan for a GPU" in opened.tab.inner_html("#roofline")
    opened.tab.keyboard.press("1")
    assert "3.0 MB, 50.0%" in opened.text("#panel")
    opened.close()


def test_hostile_names_are_text_in_every_view(browser: Any, tmp_path: Path) -> None:
    hostile = acc.from_json(attacked(chain().to_json()), "x.json")
    opened = Page(browser, tmp_path / "hostile.html", picture.to_html(hostile))
    tab = opened.tab
    for view in "12345":
        tab.keyboard.press(view)
        for summary in tab.locator("summary:visible").all():
            summary.click()
        tab.keyboard.press("j")
        assert "<img src=x onerror=alert(1)>" in opened.text("#panel")
    assert opened.count("img") == 0 and opened.count("script") == 2
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in tab.inner_text("body")
    opened.close()
