"""Plots as self-contained SVG: bars of the speed-up per model, and a roofline.

Colours are told apart also by people who confuse red and green (Okabe, Ito 2008).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, PALE = "#222222", "#dddddd"
BAR, GAP, LEFT, TOP, WIDTH = 14, 14, 190, 64, 860


def speed_ups(title: str, ratios: Mapping[str, Mapping[str, float | None]]) -> str:
    """Horizontal bars: for each label (a model and batch) the ratio to each peer; a line at 1.

    Bars left of the line are where we lose. A ratio of None is told in words.
    """
    peers = list(dict.fromkeys(peer for row in ratios.values() for peer in row))
    values = [v for row in ratios.values() for v in row.values() if v is not None]
    most = max([*values, 1.0]) * 1.08
    scale = (WIDTH - LEFT - 70) / most
    parts = [_legend(peers)]
    y: float = TOP
    for label, row in ratios.items():
        height = BAR * len(row)
        parts.append(_text(LEFT - 8, y + height / 2 + 4, label, "end"))
        for peer, value in row.items():
            colour = COLOURS[peers.index(peer) % len(COLOURS)]
            told = "no figure" if value is None else f"{value:.2f}x"
            length = 0.0 if value is None else value * scale
            if value is not None:
                parts.append(
                    f'<rect x="{LEFT}" y="{y:.1f}" width="{length:.1f}" height="{BAR - 2}" '
                    f'fill="{colour}"><title>{escape(f"{label} against {peer}: {told}")}</title>'
                    "</rect>"
                )
            parts.append(_text(LEFT + length + 4, y + BAR - 4, told, "start", 10))
            y += BAR
        y += GAP
    one = LEFT + scale
    parts.append(
        f'<line x1="{one:.1f}" y1="{TOP - 6}" x2="{one:.1f}" y2="{y:.1f}" stroke="{INK}" '
        'stroke-dasharray="4 3"/>'
    )
    parts.append(_text(one, TOP - 10, "as fast", "middle", 10))
    return _page(title, WIDTH, y + 10, parts)


def roofline(
    title: str,
    points: Sequence[tuple[str, float, float]],
    tflops: float | None = None,
    gbps: float | None = None,
) -> str:
    """A scatter of (label, FLOP per byte, TFLOP/s), both axes logarithmic.

    tflops, gbps: the roof, where the machine's is known.
    """
    height, bottom = 460, 400
    xs = [max(x, 1e-6) for _, x, _ in points] or [1.0]
    ys = [max(y, 1e-9) for _, _, y in points] or [1.0]
    if tflops is not None and gbps is not None:
        xs.append(tflops * 1e3 / gbps)
        ys.append(tflops)
    across = _Axis(min(xs), max(xs), 80, WIDTH - 30)
    up = _Axis(min(ys), max(ys), bottom, TOP)
    parts = [*across.ticks(bottom, "x"), *up.ticks(80, "y")]
    parts.append(_text(WIDTH / 2, bottom + 42, "FLOP per byte", "middle"))
    parts.append(_text(12, TOP - 14, "TFLOP/s", "start"))
    if tflops is not None and gbps is not None:
        bend = tflops * 1e3 / gbps
        line = [
            (across.low, across.low * gbps / 1e3), (min(bend, across.high), tflops),
            (across.high, tflops),
        ]  # fmt: skip
        way = " ".join(
            f"{across.at(x):.1f},{min(up.at(max(y, up.low)), bottom):.1f}" for x, y in line
        )
        parts.append(f'<polyline points="{way}" fill="none" stroke="{INK}"/>')
    for at, (label, x, y) in enumerate(points):
        cx, cy = across.at(max(x, 1e-6)), up.at(max(y, 1e-9))
        colour = COLOURS[at % len(COLOURS)]
        told = escape(f"{label}: {x:.3g} FLOP/byte, {y:.3g} TFLOP/s")
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{colour}"><title>{told}</title>'
            "</circle>"
        )
        parts.append(_text(cx + 6, cy + 3, label, "start", 9))
    return _page(title, WIDTH, height, parts)


class _Axis:
    """A logarithmic axis over whole decades, from pixel `first` to pixel `last`."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low = 10.0 ** math.floor(math.log10(low))
        self.high = 10.0 ** max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)
        self._first, self._last = first, last

    def at(self, value: float) -> float:
        """The pixel of a value."""
        span = math.log10(self.high / self.low)
        return self._first + (self._last - self._first) * math.log10(value / self.low) / span

    def ticks(self, cross: float, axis: str) -> list[str]:
        """The axis with a label per decade, at the pixel `cross` of the other one."""
        ends = (self._first, cross, self._last, cross)
        x1, y1, x2, y2 = ends if axis == "x" else (cross, self._first, cross, self._last)
        parts = [f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}"/>']
        count = round(math.log10(self.high / self.low))
        for decade in range(count + 1):
            value = self.low * 10.0**decade
            at = self.at(value)
            if axis == "x":
                parts.append(_text(at, cross + 18, f"{value:g}", "middle", 10))
            else:
                parts.append(_text(cross - 8, at + 4, f"{value:g}", "end", 10))
        return parts


def _legend(peers: Sequence[str]) -> str:
    parts = []
    x: float = LEFT
    for at, name in enumerate(peers):
        colour = COLOURS[at % len(COLOURS)]
        parts.append(f'<rect x="{x:.0f}" y="30" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 14, 39, name, "start", 11))
        x += 30 + 7 * len(name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{INK}">{escape(text)}</text>'
    )


def _page(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white" stroke="{PALE}"/>\n'
        f"{_text(12, 20, title, 'start', 14)}\n{body}\n</svg>\n"
    )
