"""Interface of a picture family (shapes, charts, rendered text): pictures, captions, and closed questions.

A family has named levels of difficulty. A level lists its questions and draws pictures for any requested answers, so
the caller can make all answers equally frequent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

Answers = Mapping[str, str]
"""Answer by question kind."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (25, 150, 50),
    "blue": (30, 60, 225),
    "yellow": (250, 220, 25),
    "purple": (150, 35, 185),
    "black": (12, 12, 12),
}
"""Named RGB colours; they are so different that `shade` never makes two of them similar."""

PAPER: dict[str, tuple[int, int, int]] = {"white": (252, 252, 252), "grey": (205, 205, 205)}
"""Neutral backgrounds that contrast with every colour of `COLOURS`."""

SIZES = ((256, 256), (240, 256), (224, 256), (256, 240), (256, 224), (272, 240))
"""Picture sizes (width, height) in pixels; most are not square, so padding is exercised."""

NUMBERS = ("one", "two", "three", "four", "five")
"""Number words from 1."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with a closed list of one-word answers."""

    kind: str
    """Name that groups results, such as `shape-colour`."""
    text: str
    """The same words in training and in evaluation."""
    values: tuple[str, ...]
    """All possible answers; at least four."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn picture with its caption and answers."""

    image: Image.Image
    """RGB."""
    caption: str
    """One sentence that names every answer."""
    answers: Answers
    """Answer to each question of the level."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of difficulty."""

    questions: tuple[Question, ...]
    draw: Callable[[random.Random, Answers], Picture]
    """Draws one picture for the given answers, which may cover any subset of the questions."""


Family = Mapping[str, Level]
"""Level by name."""


def pick(rng: random.Random, question: Question, wanted: Answers) -> str:
    """The requested answer to a question, or else a random one of its values."""
    return wanted[question.kind] if question.kind in wanted else rng.choice(question.values)


def shade(rng: random.Random, colour: tuple[int, int, int], *, spread: int = 12) -> tuple[int, int, int]:
    """A similar colour: each channel changes by at most `spread` of 255."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def blank(rng: random.Random, colour: tuple[int, int, int]) -> Image.Image:
    """An empty RGB picture of one of `SIZES`."""
    return Image.new("RGB", rng.choice(SIZES), shade(rng, colour, spread=8))
