"""A Gantt chart of steps, simulated or measured: one panel per kind of step, one row per rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from megavl.planner.scenario import Kind

COLOURS = {
    "encoders forward": "#e69f00",
    "encoders backward": "#b35c00",
    "decoder forward": "#56b4e9",
    "decoder backward": "#0072b2",
    "head forward": "#7fd6b4",
    "head backward": "#009e73",
    "transfer": "#cc79a7",
    "waiting": "#f3dfe9",
    "gradient reduction": "#8c6bb1",
    "optimizer": "#6b6b6b",
    "loading": "#a89f91",
}
"""Kinds of box, in the colour-blind safe palette of Okabe and Ito; where a rank is idle, there is no box.

`waiting` occurs in measured steps only: an exchange between ranks from its call to its end, the peer's delay included.
"""
IDLE = "#f0f0ee"
_DARK = {"encoders backward", "decoder backward", "head backward", "gradient reduction", "optimizer"}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One box of the picture."""

    rank: int
    start: float
    end: float
    what: str
    """Row of `COLOURS`."""
    micro_batch: int | None = None
    stage: int | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One kind of step."""

    kind: Kind
    segments: tuple[Segment, ...]
    ranks: tuple[str, ...]
    """Name of every row."""
    busy: tuple[float, ...]
    """Share of the schedule in which each rank computes."""
    seconds: float
    bubble: float
    micro_batches: int
    """How many are drawn."""
    whole: int
    """How many a step has."""


_LEFT, _WIDTH, _RIGHT = 240, 1900, 110
_ROW, _GAP, _TOP, _HEAD, _AXIS = 30, 6, 84, 26, 34
_LEAST_LABEL = 13
"""Narrowest box, in pixels, that shows its number."""


def draw(panels: Sequence[Panel], *, title: str) -> str:
    """The chart as an SVG document.

    Args:
        panels: one per kind of step, all to the same scale.
    """
    longest = max(_end(panel) for panel in panels)
    scale = _WIDTH / longest
    body: list[str] = []
    y = float(_TOP)
    for panel in panels:
        body += _panel(panel, y=y, scale=scale)
        y += _height(panel)
    width, height = _LEFT + _WIDTH + _RIGHT, math.ceil(y + 8)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        "<style>text{fill:#222}.n{font-size:10px;text-anchor:middle}.w{fill:#fff}.t{font-size:10px;fill:#555}"
        ".b{font-weight:bold}.e{text-anchor:end}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="24" class="b" font-size="15">{escape(title)}</text>',
        *_legend(panels),
    ]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


def _legend(panels: Sequence[Panel]) -> Iterator[str]:
    used = {segment.what for panel in panels for segment in panel.segments}
    x = 16.0
    for name, colour in [*((name, COLOURS[name]) for name in COLOURS if name in used), ("idle", IDLE)]:
        yield f'<rect x="{x:.0f}" y="42" width="14" height="14" fill="{colour}" stroke="#bbb"/>'
        yield f'<text x="{x + 19:.0f}" y="53">{name}</text>'
        x += 38 + 6.6 * len(name)
    note = "numbers are micro-batches; right of each row: share of the schedule in which the rank computes"
    yield f'<text x="16" y="74" class="t">{note}</text>'


def _panel(panel: Panel, *, y: float, scale: float) -> Iterator[str]:
    shown = (
        ""
        if panel.micro_batches == panel.whole
        else f", drawn with {panel.micro_batches} of {panel.whole} micro-batches"
    )
    yield (
        f'<text x="16" y="{y + 16:.0f}" class="b">{panel.kind} step: {panel.seconds:.4g} s, bubble '
        f"{panel.bubble:.1%}{shown}</text>"
    )
    top = y + _HEAD
    for rank, name in enumerate(panel.ranks):
        row = top + rank * (_ROW + _GAP)
        yield f'<text x="{_LEFT - 10}" y="{row + _ROW / 2 + 4:.1f}" class="e">{escape(name)}</text>'
        yield f'<rect x="{_LEFT}" y="{row:.1f}" width="{_end(panel) * scale:.2f}" height="{_ROW}" fill="{IDLE}"/>'
        for segment in panel.segments:
            if segment.rank == rank:
                yield from _box(segment, y=row, scale=scale)
        yield f'<text x="{_LEFT + _WIDTH + 10}" y="{row + _ROW / 2 + 4:.1f}">{panel.busy[rank]:.1%} busy</text>'
    yield from _axis(_end(panel), y=top + len(panel.ranks) * (_ROW + _GAP), scale=scale)


def _box(segment: Segment, *, y: float, scale: float) -> Iterator[str]:
    x, width = _LEFT + segment.start * scale, (segment.end - segment.start) * scale
    where = "" if segment.micro_batch is None else f", micro-batch {segment.micro_batch}, stage {segment.stage}"
    tip = f"{segment.what}{where}: {segment.start:.4g} to {segment.end:.4g} s"
    yield (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{_ROW}" fill="{COLOURS[segment.what]}" '
        f'stroke="#fff" stroke-width="0.4"><title>{tip}</title></rect>'
    )
    if segment.micro_batch is not None and segment.what.startswith("decoder") and width >= _LEAST_LABEL:
        style = "n w" if segment.what in _DARK else "n"
        yield f'<text x="{x + width / 2:.1f}" y="{y + _ROW / 2 + 4:.1f}" class="{style}">{segment.micro_batch}</text>'


def _axis(seconds: float, *, y: float, scale: float) -> Iterator[str]:
    step = _round_step(seconds / 10)
    for index in range(int(seconds / step) + 1):
        x = _LEFT + index * step * scale
        yield f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + 5:.1f}" stroke="#888"/>'
        yield f'<text x="{x:.1f}" y="{y + 17:.1f}" class="t" text-anchor="middle">{index * step:.4g} s</text>'


def _round_step(seconds: float) -> float:
    """1, 2 or 5 times a power of ten, at least `seconds`."""
    power = 10.0 ** math.floor(math.log10(seconds))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= seconds)


def _end(panel: Panel) -> float:
    return max(segment.end for segment in panel.segments)


def _height(panel: Panel) -> float:
    return _HEAD + len(panel.ranks) * (_ROW + _GAP) + _AXIS
