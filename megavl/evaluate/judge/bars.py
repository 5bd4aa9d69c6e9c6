"""Verdicts as stacked bars in SVG and as a table in Markdown (Figure 7 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megavl.evaluate.drawing import GREY, INK, PALETTE, frame, short, text

LEFT, WIDTH, RIGHT = 190, 480, 190
"""Pixels for names, for all questions with a verdict, and for figures."""
TOP, STEP, BAR = 92, 44, 24
TIE = "#c9c9c9"
COLOURS = {"A": PALETTE[0], "tie": TIE, "B": PALETTE[1]}


def bars(report: Mapping[str, Any]) -> str:
    """One bar for all questions, and one for each category; `report` as `compare.report` gives it."""
    rows = {"all questions": report["all"], **report["by_category"]}
    names = report["models"]
    legend = {"A": f"{short(names[0], 24)} better", "tie": "tie", "B": f"{short(names[1], 24)} better"}
    parts = [text(20, 30, f"Judged by {short(str(report['judge']), 60)}", size=17, weight="bold")]
    x = 20.0
    for key, label in legend.items():
        parts.append(f'<rect x="{x:g}" y="50" width="14" height="14" fill="{COLOURS[key]}"/>' + text(x + 20, 62, label))
        x += 46 + 7.2 * len(label)
    for number, (name, found) in enumerate(rows.items()):
        parts += _bar(name, found, TOP + STEP * number, bold=number == 0)
    height = TOP + STEP * len(rows) + 30
    note = "Score: wins and half of the ties of the first model, with its interval of 95%."
    parts.append(text(20, height - 14, note, size=11, fill=GREY))
    return frame(parts, width=LEFT + WIDTH + RIGHT, height=height, title=f"{names[0]} against {names[1]}")


def _bar(name: str, found: Mapping[str, Any], top: float, *, bold: bool) -> Iterator[str]:
    yield text(LEFT - 12, top + 16, short(name, 24), anchor="end", weight="bold" if bold else "normal")
    x = float(LEFT)
    for key, colour in COLOURS.items():
        width = WIDTH * found[key] / found["n"] if found["n"] else 0.0
        if width:
            yield f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'
            if width > 22:
                ink = INK if key == "tie" else "white"
                yield text(x + width / 2, top + 17, str(found[key]), anchor="middle", fill=ink, weight="bold")
        x += width
    errors = f"{found['errors']} without verdict" if found["errors"] else ""
    if not found["n"]:
        yield text(LEFT + 6, top + 16, errors or "no question", fill=GREY)
        return
    low, high = (100 * end for end in found["interval"])
    yield text(LEFT + WIDTH + 14, top + 11, f"{100 * found['score']:.1f} ({low:.1f} to {high:.1f})", weight="bold")
    yield text(LEFT + WIDTH + 14, top + 25, f"n {found['n']}{', ' if errors else ''}{errors}", size=11, fill=GREY)


def table(report: Mapping[str, Any]) -> str:
    """The same figures as a table in Markdown."""
    first, second = (short(name, 40).replace("|", "/") for name in report["models"])
    lines = [
        f"| questions | {first} better | tie | {second} better | no verdict | score of {first} | consistent |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for name, found in {"all": report["all"], **report["by_category"]}.items():
        score = "-"
        if found["n"]:
            low, high = (100 * end for end in found["interval"])
            score = f"{100 * found['score']:.1f} ({low:.1f} to {high:.1f})"
        share = "-" if found["consistent"] is None else f"{100 * found['consistent']:.1f}%"
        cells = (found["A"], found["tie"], found["B"], found["errors"], score, share)
        lines.append(f"| {name.replace('|', '/')} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
