"""What the built documentation has beside its pages: pictures of "flow" blocks, and a page of all
commands with their options. A hook of mkdocs (mkdocs.yml); `make docs` runs it.
"""

from __future__ import annotations

import argparse
import os
import re
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

from convloom.cli import main as cli
from convloom.compiler.explain.layers import draw
from mkdocs.structure.files import File, Files

OPTIONS = "reference/options.md"
HEAD = """# Commands and options

What `convloom COMMAND --help` prints; [Command line](../commands.md) has examples.
"""
FLOW = re.compile(r"^```flow\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHARACTER, LINE, PAD = 7.4, 19.0, 12.0
"""Pixels of a letter, of a line, and around the text of a box."""


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the page of options."""
    files.append(File.generated(config, OPTIONS, content=options_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Draws the page's flow blocks."""
    return FLOW.sub(lambda block: flow_picture(block[1]), markdown)


def options_page() -> str:
    """Every command and its options, as Markdown."""
    os.environ["COLUMNS"] = "88"
    (commands,) = (
        action.choices
        for action in cli.parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    sections = [
        f"## convloom {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n"
        for name, parser in commands.items()
    ]
    return "\n".join([HEAD, *sections])


def flow_picture(text: str) -> str:
    """An SVG of lines "this -> that -> that": boxes under each other, joined by arrows.

    "|" ends a line inside a box.
    """
    edges, sizes = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        names = [name.strip() for name in line.split("->")]
        edges += list(pairwise(names))
        for name in names:
            rows = name.split("|")
            sizes[name] = (
                CHARACTER * max(map(len, rows)) + 2 * PAD,
                LINE * len(rows) + PAD,
            )
    drawing = draw(sizes, edges)
    parts = [
        f'<path d="{path}" fill="none" stroke="currentColor" marker-end="url(#flow)"/>'
        for path in drawing.paths.values()
    ]
    for name, box in drawing.boxes.items():
        parts.append(
            f'<rect x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" '
            f'height="{box.height:.1f}" rx="6" fill="none" stroke="currentColor"/>'
        )
        for at, row in enumerate(name.split("|")):
            parts.append(
                f'<text x="{box.x:.1f}" y="{box.top + LINE * (at + 1) - 1:.1f}" '
                f'text-anchor="middle" fill="currentColor">{escape(row.strip())}</text>'
            )
    width, height = drawing.width + 4, drawing.height + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" style="max-width: 100%" font-size="13" font-family="sans-serif" '
        f'role="img" aria-label="{escape(" ".join(text.split()), {chr(34): "&quot;"})}">'
        '<defs><marker id="flow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" '
        'markerHeight="9" orient="auto"><path d="M0 0L8 4L0 8z" fill="currentColor"/></marker>'
        f"</defs>{''.join(parts)}</svg>"
    )
