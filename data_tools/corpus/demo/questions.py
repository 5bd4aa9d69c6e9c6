"""Balanced multiple choice: no answer, option or place in the list is likelier than another."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

from data_tools.corpus.demo.picture import Question

T = TypeVar("T")

CHOICES = 4
"""Options of every evaluation question; chance is one in four."""

PLACEHOLDER = "<image_placeholder>"
"""Where the picture stands in an evaluation prompt."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options of one evaluation question."""

    options: tuple[str, ...]
    """`CHOICES` different values of the question."""
    answer: int
    """Index of the right option."""

    @property
    def value(self) -> str:
        """The right option."""
        return self.options[self.answer]


def balanced_choices(question: Question, *, count: int, rng: random.Random) -> list[Choice]:
    """Options and answers for `count` evaluation questions of one kind.

    Answers, the places of the right option, and how often each value appears among the options differ by at most one
    between values, so that a reader who sees no picture gains nothing over chance by preferring a value or a place.
    """
    answers = _rounds(list(question.values), count=count, rng=rng)
    places = _rounds(list(range(CHOICES)), count=count, rng=rng)
    shown: Counter[str] = Counter()
    choices = []
    for answer, place in zip(answers, places, strict=True):
        others = [value for value in question.values if value != answer]
        rng.shuffle(others)
        options = sorted(others, key=lambda value: shown[value])[: CHOICES - 1]
        rng.shuffle(options)
        options.insert(place, answer)
        shown.update(options)
        choices.append(Choice(options=tuple(options), answer=place))
    rng.shuffle(choices)
    return choices


def _rounds(values: list[T], *, count: int, rng: random.Random) -> list[T]:
    """Every value once per round, each round in a new order."""
    drawn: list[T] = []
    while len(drawn) < count:
        drawn += rng.sample(values, len(values))
    return drawn[:count]
