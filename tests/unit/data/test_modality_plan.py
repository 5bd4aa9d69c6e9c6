"""The modality plan: right at every prefix, warm-up, closed form."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.config.errors import UsageError
from megavl.data.plan import ModalityPlan


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 50))
def test_prefixes_have_the_right_count_within_one(seed: int, percent: int, warmup: int) -> None:
    plan = ModalityPlan(seed=seed, fraction=percent / 100, warmup_steps=warmup)
    wanted, seen = Fraction(0), 0
    for step in range(150):
        assert plan.wanted_before(step) == wanted
        assert abs(seen - wanted) < 1
        assert plan.multimodal_before(step) == seen
        share = Fraction(percent, 100) * (min(Fraction(1), Fraction(step, warmup)) if warmup else 1)
        wanted += share
        seen += plan.modality(step) == "multimodal"


def test_seeds_shift_the_pattern() -> None:
    patterns = {tuple(ModalityPlan(seed=s, fraction=0.3).modality(n) for n in range(30)) for s in range(20)}
    assert len(patterns) > 5


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, {"text"}), (1.0, {"multimodal"})])
def test_extremes_are_pure(fraction: float, expected: set[str]) -> None:
    plan = ModalityPlan(seed=3, fraction=fraction)
    assert {plan.modality(step) for step in range(50)} == expected


def test_warmup_begins_with_text() -> None:
    plan = ModalityPlan(seed=3, fraction=1.0, warmup_steps=100)
    assert plan.modality(0) == "text"
    first, last = (sum(plan.modality(n) == "multimodal" for n in part) for part in (range(50), range(50, 100)))
    assert (first, last) in {(12, 37), (12, 38), (13, 37), (12, 36), (13, 36)}
    assert all(plan.modality(n) == "multimodal" for n in range(101, 150))


def test_late_steps_cost_nothing() -> None:
    plan = ModalityPlan(seed=3, fraction=0.3, warmup_steps=2000)
    assert plan.multimodal_before(10**12) == pytest.approx(0.3 * (10**12 - 1000.5), abs=1)


def test_shares_outside_the_range_are_refused() -> None:
    with pytest.raises(UsageError, match=r"multimodal_fraction 1\.5"):
        ModalityPlan(seed=0, fraction=1.5)
