"""Figures of a benchmark: its score with a confidence interval, by group, and how many answers could not be parsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megavl.evaluate.benchmarks.item import Outcome
from megavl.evaluate.interval import bootstrap, wilson

Figures = dict[str, Any]


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each group, in the order of their names."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.item.kind, []).append(outcome)
    return dict(sorted(found.items()))


def accuracy(outcomes: Sequence[Outcome]) -> Figures:
    """Share of right answers."""
    right = sum(outcome.score == 1 for outcome in outcomes)
    return {
        "score": right / len(outcomes),
        "interval": list(wilson(right, len(outcomes))),
        "interval_kind": "Wilson",
        **_counts(outcomes),
        "chance": _chance(outcomes),
        "by_kind": {
            kind: {"score": sum(one.score == 1 for one in some) / len(some), "n": len(some)}
            for kind, some in by_kind(outcomes).items()
        },
    }


def circular(outcomes: Sequence[Outcome]) -> Figures:
    """Share of questions that are answered right in every rotation of their options.

    `plain` is the accuracy over the rows that are no rotation.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.item.group, []).append(outcome)
    right = {group: all(one.score == 1 for one in rows) for group, rows in groups.items()}
    first = [outcome for outcome in outcomes if outcome.item.id == outcome.item.group]
    kinds: dict[str, list[bool]] = {}
    for group, rows in groups.items():
        kinds.setdefault(rows[0].item.kind, []).append(right[group])
    chances = [_product([1 / len(one.item.choices) for one in rows]) for rows in groups.values()]
    return {
        "score": sum(right.values()) / len(groups),
        "interval": list(wilson(sum(right.values()), len(groups))),
        "interval_kind": "Wilson",
        **_counts(outcomes),
        "n": len(groups),
        "rows": len(outcomes),
        "plain": sum(one.score == 1 for one in first) / len(first) if first else None,
        "chance": sum(chances) / len(chances),
        "by_kind": {kind: {"score": sum(some) / len(some), "n": len(some)} for kind, some in sorted(kinds.items())},
    }


def yes_or_no(outcomes: Sequence[Outcome]) -> Figures:
    """F1 of `Yes`, over all questions and for each file, with accuracy, precision, recall and the share of `Yes`."""
    return {
        "score": _f1(outcomes),
        "interval": list(bootstrap(outcomes, _f1)),
        "interval_kind": "bootstrap",
        **_counts(outcomes),
        "chance": None,
        **_rates(outcomes),
        "by_kind": {
            kind: {"score": _f1(some), "n": len(some), **_rates(some)} for kind, some in by_kind(outcomes).items()
        },
    }


def graded(outcomes: Sequence[Outcome]) -> Figures:
    """Mean of the grades that a judge gave, with the share of each capability; null without a judge.

    A question whose grade could not be had counts as `ungraded` and not at all in the score.
    """
    grades = [outcome for outcome in outcomes if outcome.score is not None]
    kinds: dict[str, list[Outcome]] = {}
    for outcome in grades:
        for kind in outcome.item.kind.split("+"):
            kinds.setdefault(kind, []).append(outcome)
    return {
        "score": _mean(grades) if grades else None,
        "interval": list(bootstrap(grades, _mean)) if grades else None,
        "interval_kind": "bootstrap",
        **_counts(outcomes),
        "ungraded": len(outcomes) - len(grades),
        "chance": None,
        "by_kind": {kind: {"score": _mean(some), "n": len(some)} for kind, some in sorted(kinds.items())},
    }


def _counts(outcomes: Sequence[Outcome]) -> Figures:
    return {"n": len(outcomes), "failed_parses": sum(outcome.prediction is None for outcome in outcomes)}


def _chance(outcomes: Sequence[Outcome]) -> float | None:
    """Expected accuracy of a blind choice; an open question cannot be guessed, and None stands for only such."""
    if not any(one.item.choices for one in outcomes):
        return None
    return sum(1 / len(one.item.choices) if one.item.choices else 0.0 for one in outcomes) / len(outcomes)


def _rates(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """Rates of `Yes` and `No`; a failed parse is neither."""
    said = sum(one.prediction == "Yes" for one in outcomes)
    wanted = sum(one.item.answer == "Yes" for one in outcomes)
    both = sum(one.prediction == one.item.answer == "Yes" for one in outcomes)
    return {
        "accuracy": sum(one.score == 1 for one in outcomes) / len(outcomes),
        "precision": both / said if said else 0.0,
        "recall": both / wanted if wanted else 0.0,
        "yes_rate": said / len(outcomes),
    }


def _f1(outcomes: Sequence[Outcome]) -> float:
    rates = _rates(outcomes)
    precision, recall = rates["precision"], rates["recall"]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _mean(outcomes: Sequence[Outcome]) -> float:
    return sum(one.score or 0.0 for one in outcomes) / len(outcomes)


def _product(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value
    return product
