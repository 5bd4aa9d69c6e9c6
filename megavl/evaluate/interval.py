"""Confidence intervals of 95% for figures of an evaluation.

Shares of right answers have Wilson's score interval (E. B. Wilson, JASA 22, 1927), which stays inside 0 to 1 and holds
for few questions. Everything else has a percentile bootstrap over questions, with a fixed seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

Z = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""
DRAWS = 1000

T = TypeVar("T")


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of right answers; (0, 1) for no answers."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(found: Sequence[T], figure: Callable[[Sequence[T]], float], *, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a figure over resampled questions."""
    if not found:
        return 0.0, 1.0
    draw = random.Random(seed)
    values = sorted(figure(draw.choices(found, k=len(found))) for _ in range(DRAWS))
    return values[int(0.025 * DRAWS)], values[int(0.975 * DRAWS) - 1]
