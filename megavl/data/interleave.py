"""Several sources in one endless order, each with its exact share of every prefix to within one.

Shares are ratios of whole numbers, so the order repeats after their sum; one period is laid out beforehand, and any
place of the endless order is two table look-ups.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from megavl.config.errors import UsageError

MAX_PERIOD = 100_000
"""Longest period that is laid out: 0.2 s and 12 bytes a place."""


class Interleave:
    """Source of every place of an endless order."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """Lay out one period.

        Args:
            weights: above 0, one for each source.

        Raises:
            UsageError: the weights have no common step that is coarse enough.
        """
        scale = lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        self.counts = tuple(count // gcd(*whole) for count in whole)
        self.period = sum(self.counts)
        if self.period > MAX_PERIOD:
            shown = ", ".join(f"{float(weight):g}" for weight in weights)
            raise UsageError(
                f"data.sources: weights {shown} repeat only after {self.period} sequences, above {MAX_PERIOD}; "
                "write them with fewer digits, for instance as percentages with one decimal place"
            )
        self._sources, self._earlier, self._places = _period(self.counts)

    def at(self, place: int) -> tuple[int, int]:
        """Source at a place, and how many earlier places are its own."""
        round_, rest = divmod(place, self.period)
        source = int(self._sources[rest])
        return source, round_ * self.counts[source] + int(self._earlier[rest])

    def before(self, place: int, *, source: int) -> int:
        """How many of the first `place` places are of this source: its share of them to within one."""
        round_, rest = divmod(place, self.period)
        return round_ * self.counts[source] + bisect_left(self._places[source], rest)


_Table = npt.NDArray[np.int32]


@lru_cache(maxsize=16)
def _period(counts: tuple[int, ...]) -> tuple[_Table, _Table, tuple[_Table, ...]]:
    """Source of each place, its earlier places, and the places of each source.

    The j-th place of a source with share s may come from place floor(j / s) on and must come before ceil((j + 1) / s):
    exactly then every prefix is right to within one. Earliest deadline first meets all of these windows (Baruah et al.,
    Proportionate Progress, Algorithmica 15, 1996).
    """
    period = sum(counts)
    sources, earlier = np.empty(period, np.int32), np.empty(period, np.int32)
    releases = [(0, source, 0) for source in range(len(counts))]
    ready: list[tuple[int, int, int]] = []
    for place in range(period):
        while releases and releases[0][0] <= place:
            _, source, number = heapq.heappop(releases)
            count = counts[source]
            heapq.heappush(ready, (-(-(number + 1) * period // count), source, number))
            if number + 1 < count:
                heapq.heappush(releases, ((number + 1) * period // count, source, number + 1))
        deadline, source, number = heapq.heappop(ready)
        assert deadline > place, "earliest deadline first missed a deadline"
        sources[place], earlier[place] = source, number
    places = tuple(np.flatnonzero(sources == source).astype(np.int32) for source in range(len(counts)))
    return sources, earlier, places
