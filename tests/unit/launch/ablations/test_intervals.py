"""Intervals against tables of Student's distribution, and the rule of the verdicts."""

from __future__ import annotations

import pytest

from launch.ablations.intervals import Estimate, estimate, has_effect, judge, t_quantile

# Two-sided 95% and 99%: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032),
         9: (2.262, 3.250), 10: (2.228, 3.169), 30: (2.042, 2.750), 100: (1.984, 2.626)}  # fmt: skip


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_table(freedom: int) -> None:
    found = t_quantile(freedom), t_quantile(freedom, 0.99)
    assert [round(value, 3) for value in found] == list(TABLE[freedom])


def test_many_degrees_approach_the_normal() -> None:
    assert t_quantile(10_000) == pytest.approx(1.959964, abs=3e-4)


def test_interval_of_known_values() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5), half = 2.7764451 * sqrt(2.5 / 5)
    assert (found.mean, found.n) == (3.0, 5)
    assert (found.low, found.high) == (pytest.approx(3 - 1.9632432), pytest.approx(3 + 1.9632432))


def test_equal_values_have_no_width() -> None:
    found = estimate([0.25, 0.25, 0.25])
    assert (found.low, found.high) == (0.25, 0.25)


def test_one_value_has_no_interval() -> None:
    found = estimate([0.5])
    assert found == Estimate(mean=0.5, low=None, high=None, n=1)
    assert judge(found, kind="better", margin=0.1, effect=True) == "too small to tell"
    assert judge(found, kind="no_worse", margin=0.1, effect=True) == "too small to tell"
    assert not has_effect(found, room=None, margin=0.1, either_way=True)


def test_two_seeds_are_too_few() -> None:
    for values, verdict in (([0.5, 0.5], "too small to tell"), ([0.5, 0.5, 0.5], "confirmed")):
        assert judge(estimate(values), kind="better", margin=0.1, effect=True) == verdict


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ("better", 0.01, 0.3, "confirmed"),
        ("better", 0.01, 0.09, "not confirmed"),
        ("better", 0.01, 0.12, "too small to tell"),
        ("better", -0.3, -0.01, "not confirmed"),
        ("better", -0.05, 0.05, "not confirmed"),
        ("better", -0.05, 0.2, "too small to tell"),
        ("better", -0.2, 0.05, "too small to tell"),
        ("better", 0.0, 0.2, "too small to tell"),
        ("no_worse", -0.05, 0.3, "confirmed"),
        ("no_worse", 0.2, 0.3, "confirmed"),
        ("no_worse", -0.3, -0.15, "not confirmed"),
        ("no_worse", -0.2, 0.2, "too small to tell"),
        ("no_worse", -0.1, 0.2, "too small to tell"),
    ],
)
def test_interval_decides_the_verdict(kind: str, low: float, high: float, verdict: str) -> None:
    difference = Estimate(mean=(low + high) / 2, low=low, high=high, n=5)
    assert judge(difference, kind=kind, margin=0.1, effect=True) == verdict  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ("no_worse", -0.01, 0.01, "too small to tell"),
        ("no_worse", 0.01, 0.02, "confirmed"),
        ("no_worse", -0.3, -0.15, "not confirmed"),
        ("better", -0.01, 0.01, "too small to tell"),
        ("better", 0.1, 0.3, "confirmed"),
        ("better", -0.3, -0.01, "not confirmed"),
    ],
)
def test_equal_without_an_effect_says_nothing(kind: str, low: float, high: float, verdict: str) -> None:
    difference = Estimate(mean=(low + high) / 2, low=low, high=high, n=5)
    assert judge(difference, kind=kind, margin=0.1, effect=False) == verdict  # type: ignore[arg-type]


def test_effect_is_beyond_the_margin_and_below_the_limit() -> None:
    def effect(gains: list[float], *, room: list[float] | None = None, either_way: bool = False) -> bool:
        left = None if room is None else estimate(room)
        return has_effect(estimate(gains), room=left, margin=0.1, either_way=either_way)

    assert effect([0.3, 0.31, 0.32]) and not effect([0.05, 0.06, 0.07]) and not effect([-0.1, 0.3, 0.9])
    assert effect([-0.3, -0.31, -0.32], either_way=True) and not effect([-0.3, -0.31, -0.32])
    assert effect([0.3, 0.31, 0.32], room=[0.2, 0.21, 0.22])
    assert not effect([0.75, 0.75, 0.74], room=[0.0, 0.0, 0.01])
