"""Draws launch/architecture.svg, the picture in README.md, from a recipe and the layout that the planner gives it.

`python launch/draw_architecture.py` rewrites the picture. It is narrow and its letters are large, so that a phone
shows it without zooming.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from megavl.config.load import load_recipe
from megavl.config.recipe import Recipe
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.layouts.check import checked_layout
from megavl.planner.scenario import make_scenario

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "launch/recipes/7b/stage2_paper.yaml"
DEVICE = "h200"
PICTURE = "launch/architecture.svg"

WIDTH, MARGIN = 440, 12
INNER = WIDTH - 2 * MARGIN
MIDDLE, RIGHT = WIDTH / 2, 292
VISION, TEXT, DECODER, LOSS, DATA, DISK = "#fde3b4", "#d3efe2", "#cfe6f7", "#f3d9e8", "#ffffff", "#eeeeea"
FLOW = (
    ("raw data", "captions, chats, documents", DISK),
    ("data_tools/", "reads, tokenizes, packs", DATA),
    ("shards", "tokens, images, manifest", DISK),
    ("megavl/data", "draws each step's Batch", DATA),
    ("megavl/model", "the picture above", DECODER),
    ("megavl/train", "optimizer, loop, supervision", DATA),
    ("checkpoint", "resharded to any layout", DISK),
    ("megavl/convert", "names and shapes, both ways", DATA),
    ("Hugging Face folder", "also the start weights", DISK),
)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / PICTURE, help=f"default: {PICTURE}")
    arguments = parser.parse_args()
    recipe = load_recipe(ROOT / RECIPE)
    layout = checked_layout(make_scenario(recipe), DEVICES[DEVICE])
    arguments.output.write_text(draw(recipe, layout), encoding="utf-8")


def draw(recipe: Recipe, layout: Sequence[int]) -> str:
    """The SVG document: the model over the ranks of a recipe, then the folders that data passes."""
    later, middle = _later_stages(layout, 446)
    flow, y = _flow(middle)
    body = [*_heading(recipe), *_first_stage(recipe, layout[0], 136), *_inputs(recipe, 80), *later, *flow]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="16">\n'
        "<title>MegaVL: how the model is laid out over ranks, and how data flows through the folders</title>\n"
        "<style>text{fill:#111}.b{font-weight:bold}.s{font-size:14px;fill:#333}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0L10 5L0 10z" fill="#333"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{y:.0f}" fill="#fff"/>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _heading(recipe: Recipe) -> Iterator[str]:
    name, parallel = recipe.model.preset.upper(), recipe.parallel
    yield _text(MIDDLE, 30, f"DeepSeek-VL {name}, training stage {recipe.training.stage}", "b", 21)
    yield _text(
        MIDDLE, 54, f"tensor {parallel.tensor} x pipeline {parallel.pipeline}, balanced for {DEVICE.upper()}", "s"
    )


def _inputs(recipe: Recipe, y: float) -> Iterator[str]:
    side = recipe.model.canvas_size
    yield from _box(MARGIN, y, 268, 36, DISK, f"images, {side} x {side} pixels")
    yield from _box(RIGHT, y, WIDTH - MARGIN - RIGHT, 36, DISK, "token ids")
    yield from (_arrow(x, y + 36, y + 56) for x in (MIDDLE - 74, 360))


def _first_stage(recipe: Recipe, layers: int, y: float) -> Iterator[str]:
    model, left = recipe.model, MARGIN + 10
    assert model.sam is not None, "the picture shows both vision towers"
    note = f"each of its {recipe.parallel.tensor} tensor ranks runs the vision part"
    yield _frame(y, 290)
    yield _text(left, y + 26, f"stage 0: {layers} decoder layers", "b", anchor="start")
    yield _text(left, y + 46, note, "s", anchor="start")
    yield from _box(left, y + 56, 126, 54, VISION, "SigLIP", f"{model.siglip.image_size} pixels")
    yield from _box(left + 132, y + 56, 126, 54, VISION, "SAM, HD", f"{model.sam.image_size} pixels")
    yield from (_arrow(x, y + 110, y + 132) for x in (85, 217))
    yield from _box(left, y + 132, 258, 54, VISION, "adaptor", f"{model.image_tokens} positions per image")
    yield from _box(RIGHT, y + 56, WIDTH - 22 - RIGHT, 130, TEXT, "text", "embedding")
    yield from (_arrow(x, y + 186, y + 208) for x in (151, 356))
    yield from _box(left, y + 208, INNER - 20, 32, TEXT, "fused: text and image positions")
    yield from _layers(y + 250, layers)


def _later_stages(layout: Sequence[int], y: float) -> tuple[list[str], float]:
    drawn = []
    for stage, count in enumerate(layout[1:], start=1):
        title = f"stage {stage}: {count} decoder layers"
        drawn += [_arrow(MIDDLE, y - 20, y), _frame(y, 72), _text(MARGIN + 10, y + 26, title, "b", anchor="start")]
        drawn += _layers(y + 36, count)
        y += 92
    drawn += [_arrow(MIDDLE, y - 20, y), *_box(MARGIN, y, INNER, 36, LOSS, "output layer and loss (last stage)")]
    fewer = " and ".join(str(stage) for stage, count in enumerate(layout) if count < max(layout))
    drawn.append(_text(MIDDLE, y + 60, f"stages {fewer} hold fewer decoder layers,", "s"))
    drawn.append(_text(MIDDLE, y + 80, "so that vision and loss do not delay the others", "s"))
    return drawn, y + 110


def _flow(y: float) -> tuple[list[str], float]:
    drawn = [_text(MIDDLE, y + 22, "From raw data to Hugging Face", "b", 21)]
    y += 42
    for number, (name, what, colour) in enumerate(FLOW):
        drawn += [_arrow(MIDDLE, y - 16, y)] if number else []
        drawn += _box(MARGIN, y, INNER, 34, colour)
        drawn.append(_text(MARGIN + 12, y + 23, name, "b", anchor="start"))
        drawn.append(_text(WIDTH - MARGIN - 12, y + 23, what, "s", anchor="end"))
        y += 50
    return drawn, y - 4


def _layers(y: float, count: int) -> Iterator[str]:
    """A row of as many boxes as a stage has decoder layers."""
    step = (INNER - 16) / 8
    yield from (_rect(MARGIN + 10 + layer * step, y, step - 4, 26, DECODER, "#0b5c94") for layer in range(count))


def _box(x: float, y: float, width: float, height: float, colour: str, *lines: str) -> Iterator[str]:
    yield _rect(x, y, width, height, colour, "#333")
    for number, line in enumerate(lines):
        below = y + height / 2 + 6 + 20 * (number - (len(lines) - 1) / 2)
        yield _text(x + width / 2, below, line, "s" if number else "b")


def _rect(x: float, y: float, width: float, height: float, colour: str, edge: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" fill="{colour}" '
        f'stroke="{edge}"/>'
    )


def _frame(y: float, height: float) -> str:
    return (
        f'<rect x="{MARGIN}" y="{y:.1f}" width="{INNER}" height="{height:.1f}" rx="8" fill="#fbfbfb" '
        'stroke="#333" stroke-width="2"/>'
    )


def _arrow(x: float, start: float, end: float) -> str:
    return f'<path d="M{x:.1f} {start:.1f}V{end:.1f}" stroke="#333" stroke-width="2" marker-end="url(#tip)"/>'


def _text(x: float, y: float, text: str, style: str, size: int | None = None, *, anchor: str = "middle") -> str:
    larger = f' style="font-size:{size}px"' if size else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}"{larger}>{escape(text)}</text>'


if __name__ == "__main__":
    main()
