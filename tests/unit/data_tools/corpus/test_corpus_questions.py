"""Evaluation questions give nothing away: all values and positions are equally likely to be right."""

import itertools
import random
from collections import Counter

import pytest

from data_tools.corpus.demo.picture_set import FAMILIES, all_questions
from data_tools.corpus.demo.questions import CHOICES, balanced_choices

QUESTIONS = all_questions()
MARGIN = 0.05


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.kind)
@pytest.mark.parametrize("count", [40, 60, 100])
def test_no_blind_strategy_beats_chance(question, count):
    choices = balanced_choices(question, count=count, rng=random.Random(count))
    assert len(choices) == count
    for choice in choices:
        assert len(set(choice.options)) == CHOICES and set(choice.options) <= set(question.values)
    by_position = Counter(choice.answer for choice in choices)
    assert max(by_position.values()) / count <= 1 / CHOICES + MARGIN
    by_value = Counter(choice.value for choice in choices)
    assert max(by_value[value] for value in question.values) - min(by_value[value] for value in question.values) <= 1
    # The strategy that always chooses one value where it is offered.
    for value in question.values:
        offered = [choice for choice in choices if value in choice.options]
        rate = sum(choice.value == value for choice in offered) / len(offered)
        assert rate <= 1 / CHOICES + MARGIN, f"{value} is right in {rate:.2f} of the questions that offer it"


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.kind)
def test_no_ranking_of_the_values_beats_chance(question):
    """Not even the ranking that is chosen with the answers known."""
    choices = balanced_choices(question, count=1200, rng=random.Random(1))
    best = max(
        sum(min(choice.options, key=ranking.index) == choice.value for choice in choices)
        for ranking in itertools.islice(itertools.permutations(question.values), 0, None, 7)
    )
    assert best / len(choices) <= 1 / CHOICES + MARGIN


def test_every_kind_has_one_wording_and_enough_values():
    kinds = [question.kind for question in QUESTIONS]
    assert len(kinds) == len(set(kinds))
    assert all(len(set(question.values)) == len(question.values) >= CHOICES for question in QUESTIONS)


@pytest.mark.parametrize(
    ("family", "level"), [(family, level) for family, levels in FAMILIES.items() for level in levels]
)
def test_any_answer_can_be_requested(family, level):
    chosen = FAMILIES[family][level]
    rng = random.Random(0)
    for question in chosen.questions:
        for value in question.values:
            picture = chosen.draw(rng, {question.kind: value})
            assert picture.answers[question.kind] == value
            assert picture.image.mode == "RGB" and 200 <= min(picture.image.size) <= max(picture.image.size) <= 300
            assert set(picture.answers) == {other.kind for other in chosen.questions}
            for other in chosen.questions:
                assert picture.answers[other.kind] in other.values
                assert picture.answers[other.kind] in picture.caption
            assert 4 <= len(picture.caption.split()) <= 15


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_picture_are_independent(family):
    """Every pair of answers of an easy picture is about equally frequent."""
    level = FAMILIES[family]["easy"]
    rng = random.Random(2)
    drawn = [level.draw(rng, {}).answers for _ in range(1500)]
    for first, second in itertools.combinations(level.questions, 2):
        pairs = Counter((answers[first.kind], answers[second.kind]) for answers in drawn)
        expected = len(drawn) / (len(first.values) * len(second.values))
        assert len(pairs) == len(first.values) * len(second.values)
        assert max(pairs.values()) <= 1.6 * expected
