"""Balanced multiple choice: all answers, options and positions are equally likely."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

from data_tools.corpus.demo.family import Question

T = TypeVar("T")

CHOICES = 4
"""Number of options of every evaluation question; chance is one in four."""

PLACEHOLDER = "<image_placeholder>"
"""Marks the position of the picture in an evaluation prompt."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options of one evaluation question."""

    options: tuple[str, ...]
    """`CHOICES` distinct values of the question."""
    answer: int
    """Index of the right option."""

    @property
    def value(self) -> str:
        """The right option."""
        return self.options[self.answer]


def balanced_choices(question: Question, *, count: int, rng: random.Random) -> list[Choice]:
    """Options and answers for `count` evaluation questions of one kind.

    Answers, positions of the right option, and appearances of each value among the options are balanced: their counts
    differ by at most one. A model that sees no picture then gains nothing over chance by preferring a value or a
    position.
    """
    answers = _rounds(list(question.values), count=count, rng=rng)
    positions = _rounds(list(range(CHOICES)), count=count, rng=rng)
    shown: Counter[str] = Counter()
    choices = []
    for answer, position in zip(answers, positions, strict=True):
        others = [value for value in question.values if value != answer]
        rng.shuffle(others)
        options = sorted(others, key=lambda value: shown[value])[: CHOICES - 1]
        rng.shuffle(options)
        options.insert(position, answer)
        shown.update(options)
        choices.append(Choice(options=tuple(options), answer=position))
    rng.shuffle(choices)
    return choices


def _rounds(values: list[T], *, count: int, rng: random.Random) -> list[T]:
    """Rounds that contain every value once, each in a new random order."""
    drawn: list[T] = []
    while len(drawn) < count:
        drawn += rng.sample(values, len(values))
    return drawn[:count]
