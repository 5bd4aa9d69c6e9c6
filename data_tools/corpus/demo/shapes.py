"""Pictures of geometric shapes, with questions on shape, colour, position and number.

`easy` draws one large shape at one side of the picture; `hard` draws one to four equal shapes anywhere.
"""

from __future__ import annotations

import random

from PIL import ImageDraw

from data_tools.corpus.demo.family import (
    COLOURS,
    NUMBERS,
    PAPER,
    Answers,
    Family,
    Level,
    Picture,
    Question,
    blank,
    pick,
    shade,
)

SHAPES = ("square", "triangle", "cross", "ring")
"""Shapes of every level; `hard` adds circles, which differ from squares only in their corners."""
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}

COLOUR = Question(kind="shape-colour", text="What colour is the shape?", values=tuple(COLOURS))
NAME = Question(kind="shape-name", text="Which shape is it?", values=SHAPES)
POSITION = Question(kind="shape-place", text="Where is the shape?", values=tuple(POSITIONS))
COLOUR_OF_MANY = Question(kind="shapes-colour", text="What colour are the shapes?", values=tuple(COLOURS))
NAME_OF_MANY = Question(kind="shapes-name", text="Which shape do you see?", values=(*SHAPES, "circle"))
COUNT = Question(kind="shapes-count", text="How many shapes are there?", values=NUMBERS[:4])


def draw_shape(
    draw: ImageDraw.ImageDraw,
    name: str,
    *,
    centre: tuple[float, float],
    radius: float,
    colour: tuple[int, int, int],
    paper: tuple[int, int, int],
) -> None:
    """Draw one shape into a square of side 2 x radius pixels around its centre."""
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        draw.ellipse(box, fill=colour)
    elif name == "square":
        side = 0.9 * radius
        draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif name == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + 0.9 * radius), (x - radius, y + 0.9 * radius)], fill=colour)
    elif name == "cross":
        arm = 0.3 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        draw.ellipse(box, fill=colour)
        hole = 0.6 * radius
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=paper)


def _draw_easy(rng: random.Random, wanted: Answers) -> Picture:
    """One shape at one side of the picture, almost two thirds of the short side across."""
    colour, name, position = (pick(rng, question, wanted) for question in (COLOUR, NAME, POSITION))
    image = blank(rng, PAPER[rng.choice(tuple(PAPER))])
    short = min(image.size)
    radius = short * rng.uniform(0.3, 0.33)
    across, down = POSITIONS[position]
    wobble = 0.04 * short
    centre = tuple(
        length / 2 + towards * (length / 2 - radius - 0.02 * short) + (0 if towards else rng.uniform(-wobble, wobble))
        for length, towards in zip(image.size, (across, down), strict=True)
    )
    draw_shape(
        ImageDraw.Draw(image),
        name,
        centre=(centre[0], centre[1]),
        radius=radius,
        colour=shade(rng, COLOURS[colour]),
        paper=_corner(image.getpixel((0, 0))),
    )
    caption = f"A {colour} {name} at the {position}."
    return Picture(
        image=image, caption=caption, answers={COLOUR.kind: colour, NAME.kind: name, POSITION.kind: position}
    )


def _draw_hard(rng: random.Random, wanted: Answers) -> Picture:
    """One to four equal shapes in the cells of a 3 x 2 grid."""
    colour, name, count = (pick(rng, question, wanted) for question in (COLOUR_OF_MANY, NAME_OF_MANY, COUNT))
    image = blank(rng, PAPER[rng.choice(tuple(PAPER))])
    columns, rows = (3, 2) if rng.random() < 0.5 else (2, 3)
    cell_width, cell_height = image.width / columns, image.height / rows
    radius = 0.42 * min(cell_width, cell_height)
    fill = shade(rng, COLOURS[colour])
    paper = _corner(image.getpixel((0, 0)))
    cells = [(column, row) for row in range(rows) for column in range(columns)]
    for column, row in rng.sample(cells, NUMBERS.index(count) + 1):
        centre = (
            (column + 0.5) * cell_width + rng.uniform(-1, 1) * (cell_width / 2 - radius),
            (row + 0.5) * cell_height + rng.uniform(-1, 1) * (cell_height / 2 - radius),
        )
        draw_shape(ImageDraw.Draw(image), name, centre=centre, radius=radius, colour=fill, paper=paper)
    plural = name if count == "one" else {"cross": "crosses"}.get(name, name + "s")
    caption = f"The picture shows {count} {colour} {plural}."
    answers = {COLOUR_OF_MANY.kind: colour, NAME_OF_MANY.kind: name, COUNT.kind: count}
    return Picture(image=image, caption=caption, answers=answers)


def _corner(pixel: float | tuple[int, ...] | None) -> tuple[int, int, int]:
    assert isinstance(pixel, tuple) and len(pixel) == 3, f"an RGB pixel was expected, not {pixel}"
    return pixel[0], pixel[1], pixel[2]


LEVELS: Family = {
    "easy": Level(questions=(COLOUR, NAME, POSITION), draw=_draw_easy),
    "hard": Level(questions=(COLOUR_OF_MANY, NAME_OF_MANY, COUNT), draw=_draw_hard),
}
