"""Mean ratings by category as a radar in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megavl.evaluate.drawing import FAINT, GREY, INK, PALETTE, frame, short, text
from megavl.evaluate.people.ratings import SCALE

WIDTH, CENTRE, RADIUS = 720, (360.0, 320.0), 210.0
"""Pixels; the centre is the worst rating."""


def radar(found: Mapping[str, Any]) -> str:
    """One axis for each category and one outline for each model; `found` as `ratings.figures` gives it."""
    rated = {name: row for name, row in found["by_category"].items() if row["n"]} or {"all": found["all"]}
    categories, models = list(rated), list(found["models"])
    parts = [text(20, 32, "Ratings by people", size=17, weight="bold"), *_grid(categories, rated)]
    for number, model in enumerate(models):
        values = [rated[name]["ratings"][model] for name in categories]
        if None not in values:
            parts += _outline(values, colour=PALETTE[number % len(PALETTE)])
    top = CENTRE[1] + RADIUS + 78
    for number, model in enumerate(models):
        mean = found["all"]["ratings"][model]
        ends = found["all"]["intervals"][model]
        figure = "no rating" if mean is None else f"{mean:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
        y = top + 24 * number
        colour = PALETTE[number % len(PALETTE)]
        parts.append(f'<circle cx="28" cy="{y - 5:g}" r="7" fill="{colour}"/>' + text(44, y, short(model, 50)))
        parts.append(text(WIDTH - 20, y, figure, anchor="end", weight="bold"))
    height = int(top + 24 * len(models) + 22)
    people = len(found["people"])
    note = f"{people} {'person' if people == 1 else 'people'}, {found['all']['n']} questions, 1 to 5; intervals of 95%"
    parts.append(text(20, height - 14, note, size=11, fill=GREY))
    return frame(parts, width=WIDTH, height=height, title="Ratings by category")


def _point(axis: int, axes: int, rating: float) -> tuple[float, float]:
    share = (rating - SCALE[0]) / (SCALE[1] - SCALE[0])
    angle = 2 * math.pi * axis / axes - math.pi / 2
    return CENTRE[0] + RADIUS * share * math.cos(angle), CENTRE[1] + RADIUS * share * math.sin(angle)


def _polygon(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _grid(categories: Sequence[str], rated: Mapping[str, Any]) -> Iterator[str]:
    axes = len(categories)
    for ring in range(SCALE[0] + 1, SCALE[1] + 1):
        points = [_point(axis, axes, ring) for axis in range(axes)]
        yield f'<polygon points="{_polygon(points)}" fill="none" stroke="{FAINT}"/>'
        x, y = points[0]
        yield text(x + 6, y + 13, str(ring), size=11, fill=GREY)
    for axis, name in enumerate(categories):
        x, y = _point(axis, axes, SCALE[1])
        yield f'<line x1="{CENTRE[0]}" y1="{CENTRE[1]}" x2="{x:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>'
        out_x, out_y = _point(axis, axes, SCALE[1] + 0.32)
        side = out_x - CENTRE[0]
        anchor = "middle" if abs(side) < 12 else "start" if side > 0 else "end"
        yield text(out_x, out_y, short(name, 22), anchor=anchor, fill=INK)
        yield text(out_x, out_y + 15, f"n {rated[name]['n']}", anchor=anchor, size=11, fill=GREY)


def _outline(values: Sequence[float], *, colour: str) -> Iterator[str]:
    points = [_point(axis, len(values), value) for axis, value in enumerate(values)]
    yield (
        f'<polygon points="{_polygon(points)}" fill="{colour}" fill-opacity="0.10" stroke="{colour}" '
        'stroke-width="2.5" stroke-linejoin="round"/>'
    )
    yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points)
