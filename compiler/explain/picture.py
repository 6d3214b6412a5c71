"""An account as a picture: kernels are boxes around their captured nodes, edges are data flow.

`to_svg` is a drawing for documents: what a pointer over a box or an op tells is in its tooltip.
`to_html` is one page around it, without anything from elsewhere: the picture folded by module
(`folding`) and whole, the kernels and modules as tables, their roofline, and the refusals; a panel
tells of what is selected. Both are made from an `Account`; the page adds the code of kernels where
the caller has it. What the page does is in `page/*.js`, whose texts all come from its JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from ...errors import visible
from ...kernels.contract.cost_model import Resources
from . import account as acc
from .account import Account, KernelNode, Record
from .account_text import (
    change_text,
    counted,
    kernel_times,
    labels,
    size_text,
    times_note,
    with_paths,
)
from .folding import levels
from .layers import Box, draw

ASSETS = Path(__file__).with_name("page")
SCRIPTS = ("data", "graph", "lists", "panel", "start")
"""Of the page, in the order in which they run."""
CHARACTERS = 40
"""Longest label of an op in a box; the tooltip has all of it."""
TITLE_PX, LINE_PX, ROW_PX = 13.0, 10.5, 11.0
ADVANCE = 0.61
"""Width of a monospaced character, in font sizes: 0.60 to 0.602 in the usual fonts."""
HEAD, ROW, PAD = 38.0, 17.0, 8.0

STYLE = (ASSETS / "picture.css").read_text(encoding="utf-8")
"""Of the drawing and its page; kinds of boxes are classes and colours of these names."""


@dataclass(frozen=True)
class KernelCode:
    """The code of one launch of a step. own, shared: the two parts of its Triton source, of which
    other kernels may have the second too; resources: where it has been compiled."""

    step: str
    name: str
    own: str
    shared: str
    resources: Resources | None = None


def _visible(value: Any) -> Any:
    """An account, all texts of which can be shown: names come from anybody's modules and files."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, tuple):
        return tuple(map(_visible, value))
    if is_dataclass(value) and not isinstance(value, type):
        shown = {item.name: _visible(getattr(value, item.name)) for item in fields(value)}
        return replace(value, **shown)
    return value


def to_svg(account: Account) -> str:
    """A whole SVG file."""
    account = _visible(account)
    namespace = ' xmlns="http://www.w3.org/2000/svg"'
    drawn = _svg(account, _contents(account), f"<style>{STYLE}</style>", namespace)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + drawn


def to_html(account: Account, code: Sequence[KernelCode] = ()) -> str:
    """One page that needs nothing else. code: of the account's kernels, as far as it is known."""
    account, code = _visible(account), _visible(tuple(code))
    boxes = _contents(account)
    drawn = _svg(account, boxes, "", "")  # First: it refuses what is too large to look at.
    bodies = list(dict.fromkeys(kernel.shared for kernel in code))
    launches = [
        {"step": kernel.step, "name": kernel.name, "own": kernel.own,
         "shared": bodies.index(kernel.shared),
         "resources": asdict(kernel.resources) if kernel.resources else None}
        for kernel in code
    ]  # fmt: skip
    folded = levels(account, {name: box.size for name, box in boxes.items()})
    shown = {place.kind for place in account.places} - {acc.INPUT, acc.OUTPUT}
    data = {
        **account.to_json(),
        "levels": [level.to_json() for level in folded],
        "kinds": [kind for kind in acc.KINDS if kind in shown],
        "code": launches,
        "bodies": bodies,
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # Inside a script element neither tags nor comments may begin.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "TITLE": escape(f"{account.model} on {account.target}"),
        "STYLE": STYLE + _asset("page.css"),
        "SVG": drawn,
        "DATA": text,
        "SCRIPT": "".join(_asset(f"{name}.js") for name in SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _headline(account: Account) -> str:
    t = account.totals
    told = [f"{t.kernels_before} -> {t.kernels_after} kernels"]
    told.append(f"{size_text(t.bytes_before)} -> {size_text(t.bytes_after)} read and written")
    if account.machine:
        told.append(change_text(t.before, t.after))
    return "; ".join([*told, times_note(account)])


def _contents(account: Account) -> dict[str, _Content]:
    records = {record.node: record for record in account.nodes}
    return {place.name: _Content(place, records, account) for place in account.places}


def _svg(account: Account, boxes: dict[str, _Content], style: str, namespace: str) -> str:
    drawing = draw({name: box.size for name, box in boxes.items()}, account.edges)
    width, height = drawing.width + 40, drawing.height + 40
    edges = [
        f'<path class="edge" data-from={quoteattr(source)} data-to={quoteattr(target)} '
        f'd="{path}" marker-end="url(#arrow)"/>'
        for (source, target), path in drawing.paths.items()
    ]
    return "\n".join(
        [
            f'<svg{namespace} class="ledger" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}">',
            f"<title>{escape(account.model)}: {escape(_headline(account))}</title>",
            style,
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="10" '
            'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto">'
            '<path d="M0 0L8 4L0 8z"/></marker></defs>',
            '<g id="view"><g transform="translate(20 20)">',
            *edges,
            *(boxes[name].svg(box) for name, box in drawing.boxes.items()),
            "</g></g></svg>\n",
        ]
    )


class _Content:
    def __init__(self, place: KernelNode, records: dict[str, Record], account: Account) -> None:
        self.place, self.short, self.is_modelled = place, labels(account), bool(account.machine)
        self.records = [records[name] for name in place.nodes]
        self.paths = {r.node: r.module_path for r in records.values() if r.module_path}
        self.figures = _figures(place)
        self.rows = [shortened(f"{r.op} {r.module_path}".strip()) for r in self.records]
        texts = ((place.name, TITLE_PX), (self.figures, LINE_PX))
        widths = [len(text) * size * ADVANCE for text, size in texts]
        widths += [len(row) * ROW_PX * ADVANCE + 12 for row in self.rows]
        height = HEAD + (len(self.rows) * ROW + PAD if self.rows else 0.0)
        self.size = (max(110.0, max(widths) + 2 * PAD + 4), height)

    def svg(self, box: Box) -> str:
        place = self.place
        free = "" if place.what in (acc.KERNEL, acc.FALLBACK) else " free"
        name = "kernel" if not free else "place"
        lines = [
            f'<g class={quoteattr(f"place {place.kind}{free}")} '
            f"data-{name}={quoteattr(place.name)} "
            f'transform="translate({box.left:.1f} {box.top:.1f})">',
            f"<title>{escape(self.tooltip())}</title>",
            f'<rect class="box" width="{box.width:.1f}" height="{box.height:.1f}" rx="6"/>',
            f'<text class="title" x="{PAD}" y="16">{escape(place.name)}</text>',
            f'<text class="figures" x="{PAD}" y="30">{escape(self.figures)}</text>',
        ]
        for at, (record, row) in enumerate(zip(self.records, self.rows, strict=True)):
            lines.append(self._row(record, row, HEAD + at * ROW, box.width))
        lines += [self._far(box), "</g>"]
        return "".join(lines)

    def _row(self, record: Record, row: str, top: float, width: float) -> str:
        gone = " gone" if record.kernel in (acc.REMOVED, acc.CONSTANT) else ""
        return (
            f'<g class="op{gone}" data-node={quoteattr(record.node)}>'
            f"<title>{escape(self.reasons(record))}</title>"
            f'<rect x="{PAD - 3}" y="{top:.1f}" width="{width - 2 * PAD + 6:.1f}" '
            f'height="{ROW - 2}" rx="3"/>'
            f'<text x="{PAD + 1}" y="{top + 11.5:.1f}">{escape(row)}</text></g>'
        )

    def _far(self, box: Box) -> str:
        """Large letters for when the whole network is seen at once."""
        path = self.place.module_path
        head, _, rest = path.partition(".") if box.height > 80 else ("", "", path)
        words = [word for word in (self.place.op, head, shortened(rest, 18)) if word]
        widest = max(map(len, words))
        size = min(46.0, (box.width - 8) / (ADVANCE * widest), (box.height - 6) / len(words) / 1.15)
        first = box.height / 2 - size * 1.15 * len(words) / 2 + size * 0.9
        spans = "".join(
            f'<tspan x="{box.width / 2:.1f}" y="{first + at * size * 1.15:.1f}">'
            f"{escape(word)}</tspan>"
            for at, word in enumerate(words)
        )
        return f'<text class="far" style="font-size:{size:.1f}px">{spans}</text>'

    def tooltip(self) -> str:
        place = self.place
        lines = [f"{place.name}: {place.what}", place.computes]
        if place.what in (acc.KERNEL, acc.FALLBACK):
            if times := kernel_times(place):
                share = [f"{place.share:.1%} of the network"] if place.share else []
                lines.append("; ".join([*times, *share]))
            moved = f"reads and writes {size_text(place.size_bytes)}"
            lines.append(f"{moved}; {place.config}" if place.config else moved)
        return "\n".join(lines)

    def reasons(self, record: Record) -> str:
        """Why the op is where it is, in a few lines."""
        lines = [f"{record.op} {record.module_path} -> {record.kernel}"]
        lines += [f"by {self.short.get(rule, '')} {rule}" for rule in record.rules]
        lines += [f"refused {with_paths(str(r), self.paths)}" for r in record.refused]
        if self.is_modelled:
            lines.append(f"alone {record.before}; its part now {record.after}")
        lines.append(
            f"saves {size_text(record.bytes_saved)}, {counted(record.kernels_saved, 'kernel')}"
        )
        return "\n".join(lines)


def _figures(place: KernelNode) -> str:
    if place.what in (acc.INPUT, acc.OUTPUT):
        return shortened(place.computes)
    if place.what == acc.FALLBACK:
        return "torch fallback"
    if place.what != acc.KERNEL:
        return place.what
    time = place.measured if place.measured.us is not None else place.modelled
    size = size_text(place.size_bytes)
    return size if time.us is None else f"{time}, {size}"


def shortened(text: str, characters: int = CHARACTERS) -> str:
    """The text with its middle left out where it is too long; its end tells most."""
    if len(text) <= characters:
        return text
    head = characters // 3
    return f"{text[:head]}…{text[head + 1 - characters:]}"
