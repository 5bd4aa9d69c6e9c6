"""Rendered text, with questions on the letter or word and on the colour of its background.

`easy` renders one large letter on a coloured card; `hard` renders a short word. The font is the one that Pillow ships,
so the pictures do not depend on the fonts of the machine.
"""

from __future__ import annotations

import random
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from data_tools.corpus.demo.family import COLOURS, Answers, Family, Level, Picture, Question, blank, pick, shade

LETTERS = ("I", "L", "O", "T", "X")
WORDS = ("cat", "moon", "tree", "fish", "book", "hand")
CARDS = tuple(colour for colour in COLOURS if colour != "black")
"""Card colours; the ink is black on yellow and white otherwise."""

LETTER = Question(kind="ocr-letter", text="Which letter is written?", values=LETTERS)
CARD = Question(kind="ocr-card", text="What colour is the card?", values=CARDS)
WORD = Question(kind="ocr-word", text="Which word is written?", values=WORDS)
GROUND = Question(kind="ocr-ground", text="What colour is behind the word?", values=CARDS)


@cache
def letter_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow ships, at a size in pixels."""
    return ImageFont.load_default(size)


def _render(rng: random.Random, text: str, *, card: str, share: float, weight: float, wobble: float) -> Image.Image:
    """Text on a coloured card.

    Args:
        rng: decides every choice.
        text: letter or word.
        card: name of the colour of the card.
        share: extent of the text relative to the card, in the tighter direction.
        weight: extra stroke width relative to the font size.
        wobble: largest shift from the centre, relative to the sides of the card.
    """
    image = blank(rng, COLOURS[card])
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=letter_font(100), stroke_width=round(100 * weight))
    size = round(100 * share * min(image.width / (right - left), image.height / (bottom - top)))
    font, stroke = letter_font(size), round(size * weight)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, stroke_width=stroke)
    x = (image.width - (right - left)) / 2 - left + rng.uniform(-wobble, wobble) * image.width
    y = (image.height - (bottom - top)) / 2 - top + rng.uniform(-wobble, wobble) * image.height
    ink = (10, 10, 10) if card == "yellow" else (250, 250, 250)
    draw.text((x, y), text, font=font, fill=shade(rng, ink, spread=5), stroke_width=stroke)
    return image


def _draw_easy(rng: random.Random, wanted: Answers) -> Picture:
    """One capital letter, 84 to 88% of the height of the card."""
    letter, card = pick(rng, LETTER, wanted), pick(rng, CARD, wanted)
    image = _render(rng, letter, card=card, share=rng.uniform(0.84, 0.88), weight=0.08, wobble=0.01)
    caption = f"The letter {letter} on a {card} card."
    return Picture(image=image, caption=caption, answers={LETTER.kind: letter, CARD.kind: card})


def _draw_hard(rng: random.Random, wanted: Answers) -> Picture:
    """One short word, 70 to 85% of the width of the card."""
    word, card = pick(rng, WORD, wanted), pick(rng, GROUND, wanted)
    image = _render(rng, word, card=card, share=rng.uniform(0.7, 0.85), weight=0.01, wobble=0.06)
    caption = f"The word {word} on a {card} card."
    return Picture(image=image, caption=caption, answers={WORD.kind: word, GROUND.kind: card})


LEVELS: Family = {
    "easy": Level(questions=(LETTER, CARD), draw=_draw_easy),
    "hard": Level(questions=(WORD, GROUND), draw=_draw_hard),
}
