"""Texts of anybody's in pages, drawings and terminals; and ledgers that do not fit together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from convloom.cli import main as cli
from convloom.cli import output
from convloom.compiler.explain import account as acc
from convloom.compiler.explain import picture
from convloom.compiler.explain.account import Account
from convloom.compiler.explain.layers import draw
from convloom.compiler.graph.typed import parse
from convloom.errors import ArtifactError, InvalidInputError, visible

from . import test_ledger as ledgers
from .artifact_files import members_of, rewrite, save_small
from .test_ledger import account_of, exporting_once

__all__ = ["exporting_once"]
ATTACK = "\x1b]0;x\x07</script><img src=x onerror=alert(1)>\"'[/b]\ud800\u202e&amp;{{DATA}}"


@pytest.fixture
def account() -> Account:
    return account_of(ledgers.residual)


def attacked(value: Any) -> Any:
    """Every text that is free, with the attack behind it."""
    enumerated = {"schema", "version", "what", "kind", "how"}
    if isinstance(value, dict):
        return {k: v if k in enumerated else attacked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [attacked(item) for item in value]
    return value + ATTACK if isinstance(value, str) and value else value


class Tags(HTMLParser):
    """The elements of a page, with all that browsers would run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_what_a_terminal_would_obey_is_made_visible() -> None:
    assert visible("a\tb\nc é 日") == "a\tb\nc é 日"
    assert visible("\x1b[31m\ud800\u202e\x9b") == r"\x1b[31m\ud800\u202e\x9b"


def test_every_text_of_a_ledger_is_text_in_pictures(account: Account) -> None:
    """Kinds and the like are enumerations; all else may be anything."""
    hostile = acc.from_json(attacked(account.to_json()), "x.json")
    assert ATTACK in hostile.model and ATTACK in hostile.places[0].name
    page, plain = Tags(), Tags()
    page.feed(picture.to_html(hostile))
    plain.feed(picture.to_html(account))
    assert page.names == plain.names and page.handlers == plain.handlers == []
    drawn = picture.to_svg(hostile)
    ElementTree.fromstring(drawn.encode())
    assert "\x1b" not in drawn and "\ud800" not in drawn
    assert "\x1b" not in picture.to_html(hostile)


def test_a_kind_is_escaped_even_where_nothing_was_read(account: Account) -> None:
    place = replace(account.places[0], kind='"><script>alert(1)</script>')
    drawn = picture.to_svg(replace(account, places=(place, *account.places[1:])))
    assert "<script" not in drawn
    ElementTree.fromstring(drawn.encode())


def test_terminals_get_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_small(tmp_path)
    members = members_of(path)
    ledger = json.loads(members["ledger.json"])
    rewrite(path, members, "ledger.json", attacked(ledger))
    members = members_of(path)
    plan = json.loads(members["plan.json"])
    plan["model"] += ATTACK
    rewrite(path, members, "plan.json", plan)
    for command in (["explain", str(path)], ["explain", str(path), "--json"]):
        assert cli.main(command) == 0
        shown = capsys.readouterr()
        text = shown.out + shown.err
        assert "1b]0;x" in text and not set("\x1b\x07\ud800\u202e") & set(text)
        text.encode()


@pytest.mark.parametrize("name", ["\x1b[2J.loom", "[/b].loom", "\udcff.loom", "a\0b"])
@pytest.mark.parametrize("command", ["run", "doctor", "explain", "verify"])
def test_paths_are_text_in_errors(
    name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, name] + (["x.npy"] if command == "run" else [])
    assert cli.main(arguments) in (1, 2)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.err
    (shown.out + shown.err).encode()


def test_notes_and_tables_take_markup_for_text(capsys: pytest.CaptureFixture[str]) -> None:
    with output.working("making [/b] \x1b[2J again"):
        pass
    output.say(output.table(["name"], [["[/b]\x1b"]], "[/b]"), "[red]")
    shown = capsys.readouterr()
    assert r"making [/b] \x1b[2J again" in shown.err
    assert r"[/b]\x1b" in shown.out and "[red]" in shown.out


# Ledgers that do not fit together.


def change(path: str, value: Any) -> Callable[[Any], None]:
    """Sets a field by its path: 'places.0.kind'."""

    def apply(data: Any) -> None:
        *steps, last = path.split(".")
        for step in steps:
            data = data[int(step) if step.isdigit() else step]
        data[int(last) if last.isdigit() else last] = value

    return apply


def twice(key: str) -> Callable[[Any], None]:
    return lambda data: data[key].append(data[key][0])


def circle(data: Any) -> None:
    source, target = data["edges"][0]
    data["edges"].append([target, source])


MISFITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "kind": (change("places.0.kind", "x"), "kind expected one of convolution, linear"),
    "what": (change("places.0.what", "x"), "what expected one of kernel, torch"),
    "how": (change("nodes.0.before.how", "guessed"), "how expected one of modelled"),
    "negative time": (change("nodes.0.before.us", -1.0), "us expected microseconds below"),
    "time that is none": (change("nodes.0.before.us", {"float": "nan"}), "us expected micros"),
    "no time": (change("nodes.0.before.us", None), "a time that is not measured has a value"),
    "share": (change("places.0.share", 7.0), "share expected a share of 1"),
    "launches": (change("places.0.launches", -1), "launches expected 0 or more"),
    "place": (change("nodes.0.place", "nowhere"), "names the place 'nowhere'"),
    "node": (change("places.0.nodes", ["nobody"]), "names the node 'nobody'"),
    "edge": (change("edges.0", ["input", "nowhere"]), "names the place"),
    "two nodes": (twice("nodes"), "node .* is there twice"),
    "two places": (twice("places"), "place .* is there twice"),
    "circle": (circle, "form a cycle"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_ledger_that_does_not_fit_together_is_refused(account: Account, name: str) -> None:
    data = json.loads(json.dumps(account.to_json()))
    spoil, message = MISFITS[name]
    spoil(data)
    with pytest.raises(ArtifactError, match=message):
        acc.from_json(data, "x.json")


def test_a_list_that_is_too_long_is_refused_before_it_is_built(account: Account) -> None:
    data = account.to_json()
    data["events"] = [None] * 65_537
    with pytest.raises(ArtifactError, match=r"events expected at most 65,536 values, got"):
        acc.from_json(data, "x.json")


def test_a_picture_that_nobody_could_wait_for_is_refused() -> None:
    count = 700
    sizes = {f"n{at}": (10.0, 10.0) for at in range(count)}
    edges = [(f"n{at}", f"n{at + 1}") for at in range(count - 1)]
    edges += [(f"n{at}", f"n{count - 1}") for at in range(count - 1)]
    with pytest.raises(InvalidInputError, match=r"boxes and bends of edges, expected at most"):
        draw(sizes, edges)


def test_more_values_than_any_network_needs_are_refused_before_they_are_built() -> None:
    data = b"[" + b"[[[[]]]]," * 8_000_000 + b"[]]"
    started = time.process_time()
    with pytest.raises(ArtifactError, match=r"expected at most 2,097,152 values, got about"):
        parse(data, "ledger.json of 'x'")
    assert time.process_time() - started < 5
