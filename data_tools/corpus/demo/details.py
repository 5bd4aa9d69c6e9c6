"""Small marks in the middle of a large card, with questions that need fine detail.

The mark takes 6 to 7% of the card: 8 pixels where the card is scaled to 128, and 3 where it is scaled to 48. Questions
and answers are those of the large letters and shapes, so a tokenizer needs no further words.
"""

from __future__ import annotations

import random

from PIL import ImageDraw

from data_tools.corpus.demo.family import PAPER, Answers, Family, Level, Picture, Question, blank, pick
from data_tools.corpus.demo.rendered_text import LETTER, LETTERS, letter_font
from data_tools.corpus.demo.shapes import NAME, SHAPES, draw_shape

SMALL_LETTER = Question(kind="detail-letter", text=LETTER.text, values=LETTERS)
SMALL_SHAPE = Question(kind="detail-shape", text=NAME.text, values=SHAPES)

INK = (15, 15, 15)
SHARES = (0.06, 0.07)
"""Height of the mark, relative to the short side of the card."""


def _draw_letter(rng: random.Random, wanted: Answers) -> Picture:
    """One small capital letter."""
    letter = pick(rng, SMALL_LETTER, wanted)
    image = blank(rng, PAPER["white"])
    draw = ImageDraw.Draw(image)
    font = letter_font(round(1.4 * rng.uniform(*SHARES) * min(image.size)))
    left, top, right, bottom = draw.textbbox((0, 0), letter, font=font, stroke_width=1)
    x, y = (_middle(rng, side) for side in image.size)
    draw.text((x - (left + right) / 2, y - (top + bottom) / 2), letter, font=font, fill=INK, stroke_width=1)
    caption = f"A card with the small letter {letter}."
    return Picture(image=image, caption=caption, answers={SMALL_LETTER.kind: letter})


def _draw_shape(rng: random.Random, wanted: Answers) -> Picture:
    """One small shape."""
    name = pick(rng, SMALL_SHAPE, wanted)
    image = blank(rng, PAPER["white"])
    radius = rng.uniform(*SHARES) * min(image.size) / 2
    centre = _middle(rng, image.width), _middle(rng, image.height)
    paper = image.getpixel((0, 0))
    assert isinstance(paper, tuple) and len(paper) == 3, f"an RGB pixel was expected, not {paper}"
    draw_shape(ImageDraw.Draw(image), name, centre=centre, radius=radius, colour=INK, paper=paper)
    return Picture(image=image, caption=f"A card with a small {name}.", answers={SMALL_SHAPE.kind: name})


def _middle(rng: random.Random, side: int) -> float:
    """A coordinate that is at most a hundredth of the side away from the middle."""
    return side / 2 + rng.uniform(-0.01, 0.01) * side


LEVELS: Family = {
    "letter": Level(questions=(SMALL_LETTER,), draw=_draw_letter),
    "shape": Level(questions=(SMALL_SHAPE,), draw=_draw_shape),
}
