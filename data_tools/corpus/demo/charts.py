"""Bar charts, with questions on the tallest bar and the number of bars.

In `easy` charts the tallest bar is nearly twice as high as any other. In `hard` charts the heights are closer and the
bars more numerous, and a question asks for the lowest one.
"""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

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

TALLEST = Question(kind="chart-tallest", text="What colour is the tallest bar?", values=tuple(COLOURS))
BARS = Question(kind="chart-bars", text="How many bars are there?", values=NUMBERS[1:])
HIGHEST = Question(kind="chart-highest", text="Which colour has the highest bar?", values=tuple(COLOURS))
LOWEST = Question(kind="chart-lowest", text="Which colour has the lowest bar?", values=tuple(COLOURS))

AXIS = (90, 90, 90)


def _draw_bars(rng: random.Random, *, colours: list[str], heights: list[float]) -> Image.Image:
    """A chart with one bar per colour; heights are relative to the height of the plot."""
    image = blank(rng, PAPER["white"])
    draw = ImageDraw.Draw(image)
    margin = 0.06 * min(image.size)
    floor, ceiling = image.height - margin, margin
    pitch = (image.width - 2 * margin) / len(colours)
    for index, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        left = margin + (index + 0.12) * pitch
        draw.rectangle(
            (left, floor - height * (floor - ceiling), left + 0.76 * pitch, floor), fill=shade(rng, COLOURS[colour])
        )
    draw.line((margin, floor, image.width - margin, floor), fill=AXIS, width=3)
    draw.line((margin, ceiling, margin, floor), fill=AXIS, width=3)
    return image


def _colours_with(rng: random.Random, first: str, *, count: int) -> list[str]:
    return [first, *rng.sample([colour for colour in COLOURS if colour != first], count - 1)]


def _draw_easy(rng: random.Random, wanted: Answers) -> Picture:
    """Two to five bars; the tallest fills the plot, the others reach at most 55% of it."""
    tallest, count = pick(rng, TALLEST, wanted), pick(rng, BARS, wanted)
    colours = _colours_with(rng, tallest, count=NUMBERS.index(count) + 1)
    bars = [(colour, rng.uniform(0.2, 0.55)) for colour in colours]
    bars[0] = (tallest, rng.uniform(0.94, 1.0))
    rng.shuffle(bars)
    image = _draw_bars(rng, colours=[colour for colour, _ in bars], heights=[height for _, height in bars])
    caption = f"A chart with {count} bars, the tallest bar is {tallest}."
    return Picture(image=image, caption=caption, answers={TALLEST.kind: tallest, BARS.kind: count})


def _draw_hard(rng: random.Random, wanted: Answers) -> Picture:
    """Four to six bars; the highest and the lowest differ from the rest by an eighth of the plot."""
    highest = pick(rng, HIGHEST, wanted)
    lowest = wanted.get(LOWEST.kind) or rng.choice([colour for colour in COLOURS if colour != highest])
    if HIGHEST.kind not in wanted and highest == lowest:
        highest = rng.choice([colour for colour in COLOURS if colour != lowest])
    middle = [colour for colour in COLOURS if colour not in (highest, lowest)]
    bars = [(colour, rng.uniform(0.4, 0.8)) for colour in rng.sample(middle, rng.randint(2, 4))]
    bars += [(highest, rng.uniform(0.92, 1.0)), (lowest, rng.uniform(0.15, 0.28))]
    rng.shuffle(bars)
    image = _draw_bars(rng, colours=[colour for colour, _ in bars], heights=[height for _, height in bars])
    caption = f"A chart where the highest bar is {highest} and the lowest bar is {lowest}."
    return Picture(image=image, caption=caption, answers={HIGHEST.kind: highest, LOWEST.kind: lowest})


LEVELS: Family = {
    "easy": Level(questions=(TALLEST, BARS), draw=_draw_easy),
    "hard": Level(questions=(HIGHEST, LOWEST), draw=_draw_hard),
}
