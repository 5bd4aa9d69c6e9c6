"""Means with confidence intervals over seeds, and verdicts on claims.

The interval of a mean is Student's: mean +- t(n - 1) * s / sqrt(n), two-sided, 95%. Arms share their seeds, so a claim
is judged by the differences of the pairs. It says nothing about other data, sizes or settings, nor about another
decoder or other towers: all seeds start from the same ancestors. Claims are not corrected for their number. Where
nothing differs, up to one in forty is confirmed.

A difference counts as positive where it goes the claimed way. Its interval over at least three seeds decides, with the
margin of the claim:

| kind of claim | confirmed | not confirmed | too small to tell |
|---|---|---|---|
| better | all above 0, and the mean at least the margin | all below 0, or equal | else |
| no worse | all above 0, or above -margin with an effect to lose | all below -margin | else |

Equal is an interval inside the margin, with an effect to lose. Arms that have learned nothing are equal too, and so are
perfect ones. So one of both arms needs an effect to lose. Its whole interval is further than the margin from chance,
and below the limit of the measure. Where no chance is known, the start of the run stands for it, and a loss counts too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""Two differences may be equal by chance, above all of accuracies; their interval then has no width."""
UNDECIDED: Final = "too small to tell"
Verdict = Literal["confirmed", "not confirmed", "too small to tell"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its interval."""

    mean: float
    low: float | None
    """None with a single value."""
    high: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval of at least one value."""
    n = len(values)
    assert n, "there is a value for each seed"
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean=mean, low=None, high=None, n=n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=n)


def judge(difference: Estimate, *, kind: Literal["better", "no_worse"], margin: float, effect: bool) -> Verdict:
    """The verdict on a claim, by the table above.

    Args:
        difference: positive where it goes the claimed way.
        margin: smallest difference that matters.
        effect: whether one of both arms has an effect to lose.
    """
    low, high = difference.low, difference.high
    if low is None or high is None or difference.n < LEAST_SEEDS:
        return UNDECIDED
    if kind == "no_worse":
        if low > 0 or (low > -margin and effect):
            return "confirmed"
        return "not confirmed" if high < -margin else UNDECIDED
    inside = -margin < low and high < margin
    if low > 0 and difference.mean >= margin:
        return "confirmed"
    return "not confirmed" if high < 0 or (inside and effect) else UNDECIDED


def has_effect(gain: Estimate, *, room: Estimate | None, margin: float, either_way: bool) -> bool:
    """Whether an arm has an effect to lose.

    Args:
        gain: above chance, or above the start of the run.
        room: what is left to the limit of the measure; None without one.
        margin: smallest difference that matters.
        either_way: a loss is an effect as well: the run has changed what it started from.
    """
    if gain.low is None or gain.high is None:
        return False
    if room is not None and (room.low is None or room.low <= 0):
        return False
    return gain.low > margin or (either_way and gain.high < -margin)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with which a share `confidence` of Student's distribution lies between -t and t.

    The distribution function has a closed form for a whole number of degrees of freedom; it is inverted by bisection.

    Args:
        freedom: degrees of freedom, at least 1.
        confidence: above 0 and below 1.
    """
    low, high = 0.0, 1.0
    while _between(high, freedom) < confidence:
        high *= 2
    # Each round halves the distance, to the last bit of a float.
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _between(middle, freedom) < confidence else (low, middle)
    return high


def _between(t: float, freedom: int) -> float:
    """Probability of |T| < t; Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for step in range(3 if odd else 2, freedom - 1, 2):
        term *= (step - 1) / step * cosine * cosine
        total += term
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + share) if odd else share
