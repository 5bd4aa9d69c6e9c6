"""A report as an SVG: one bar for each result, with its interval, its chance level and the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megavl.evaluate.drawing import FAINT, GREY, INK, frame, short, text
from megavl.evaluate.report import Report
from megavl.evaluate.results import Result, results

LEFT, WIDTH, RIGHT = 250, 520, 150
"""Pixels for names, for the scale from 0 to 1, and for values."""
TOP, STEP, BAR = 78, 40, 16
BLUE = "#7cc4ee"
PAPER = ("#d55e00", "#009e73", "#cc79a7")
"""Of the palette of Okabe and Ito, which colour-blind readers can tell apart."""


def picture(report: Report, *, title: str = "") -> str:
    """The picture as text; without any result it says so."""
    found = list(results(report))
    models = list(dict.fromkeys(name for one in found for name in one.paper))
    height = TOP + STEP * max(1, len(found)) + 34
    parts = [
        text(20, 28, short(title or "Evaluation", 100), size=16),
        *_legend(found, models),
        *(_scale(height) if found else [text(20, TOP + 20, "This report has no share to draw.", fill=GREY)]),
        *(line for number, one in enumerate(found) for line in _bar(one, TOP + STEP * number, models)),
    ]
    return frame(parts, width=LEFT + WIDTH + RIGHT, height=height, title="Results of an evaluation")


def _scale(height: int) -> Iterator[str]:
    bottom = height - 34
    for tenth in range(0, 11, 2):
        x = LEFT + WIDTH * tenth / 10
        yield f'<line x1="{x:g}" y1="{TOP - 6}" x2="{x:g}" y2="{bottom}" stroke="{FAINT}"/>'
        yield text(x, bottom + 18, f"{tenth * 10}%", size=11, anchor="middle", fill=GREY)


def _legend(found: Sequence[Result], models: Sequence[str]) -> Iterator[str]:
    x, y = 20.0, 52
    yield f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{BLUE}"/>'
    yield text(x + 20, y, "score with its 95% interval", size=12)
    x += 210
    if any(one.chance is not None for one in found):
        yield f'<line x1="{x}" y1="{y - 11}" x2="{x}" y2="{y + 2}" stroke="{INK}" stroke-dasharray="3 2"/>'
        yield text(x + 8, y, "chance", size=12)
        x += 74
    for model, colour in zip(models, PAPER):
        yield _diamond(x + 6, y - 4, colour) + text(x + 18, y, f"paper {model}", size=12)
        x += 100


def _bar(one: Result, top: float, models: Sequence[str]) -> Iterator[str]:
    middle = top + BAR / 2
    yield text(LEFT - 12, top + 7, short(one.name, 32), anchor="end")
    yield text(LEFT - 12, top + 21, f"{one.measure}, n {one.n}", size=11, anchor="end", fill=GREY)
    if one.value is None:
        yield text(LEFT + 6, middle + 4, "no score: it takes a judge", size=12, fill=GREY)
    else:
        yield f'<rect x="{LEFT}" y="{top}" width="{WIDTH * one.value:.1f}" height="{BAR}" fill="{BLUE}" rx="1"/>'
    if one.chance is not None:
        x = LEFT + WIDTH * one.chance
        ends = f'x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{top + BAR + 4}"'
        yield f'<line {ends} stroke="{INK}" stroke-dasharray="3 2"/>'
    if one.interval is not None:
        low, high = (LEFT + WIDTH * end for end in one.interval)
        for colour, width in (("white", 4), (INK, 1.5)):
            yield (
                f'<path d="M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8M{low:.1f} {middle}H{high:.1f}" '
                f'stroke="{colour}" stroke-width="{width}" fill="none"/>'
            )
    for model, colour in zip(models, PAPER):
        if model in one.paper:
            yield _diamond(LEFT + WIDTH * one.paper[model] / one.points, top + BAR + 7, colour)
    if one.value is not None and one.interval is not None:
        value, low, high = (end * one.points for end in (one.value, *one.interval))
        yield text(LEFT + WIDTH + 14, top + 9, f"{value:.1f}", weight="bold")
        yield text(LEFT + WIDTH + 14, top + 23, f"{low:.1f} to {high:.1f}", size=11, fill=GREY)


def _diamond(x: float, y: float, colour: str) -> str:
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" fill="{colour}" stroke="white"/>'
