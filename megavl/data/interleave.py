"""Several sources in one endless order, each with its exact share of every prefix to within one.

Shares are ratios of whole numbers, so the order repeats after their sum. One period is computed beforehand; any index
of the endless order is then two table look-ups.
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
"""Longest period: it takes 0.2 s and 12 bytes for each index."""


class Interleave:
    """The source at every index of an endless order."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """Compute one period.

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
        self._sources, self._earlier, self._indices = _period(self.counts)

    def at(self, index: int) -> tuple[int, int]:
        """Source at an index, and how often it occurs before."""
        round_, rest = divmod(index, self.period)
        source = int(self._sources[rest])
        return source, round_ * self.counts[source] + int(self._earlier[rest])

    def before(self, count: int, *, source: int) -> int:
        """How often a source occurs among the first `count` indices: its share of them to within one."""
        round_, rest = divmod(count, self.period)
        return round_ * self.counts[source] + bisect_left(self._indices[source], rest)


_Table = npt.NDArray[np.int32]


@lru_cache(maxsize=16)
def _period(counts: tuple[int, ...]) -> tuple[_Table, _Table, tuple[_Table, ...]]:
    """Source at each index, how often it occurs before, and the indices of each source.

    The j-th index of a source with share s is floor(j / s) at least and below ceil((j + 1) / s). Exactly then every
    prefix is right to within one. Earliest deadline first meets all of these windows (Baruah et al., Proportionate
    Progress, Algorithmica 15, 1996).
    """
    period = sum(counts)
    sources, earlier = np.empty(period, np.int32), np.empty(period, np.int32)
    releases = [(0, source, 0) for source in range(len(counts))]
    ready: list[tuple[int, int, int]] = []
    for index in range(period):
        while releases and releases[0][0] <= index:
            _, source, number = heapq.heappop(releases)
            count = counts[source]
            heapq.heappush(ready, (-(-(number + 1) * period // count), source, number))
            if number + 1 < count:
                heapq.heappush(releases, ((number + 1) * period // count, source, number + 1))
        deadline, source, number = heapq.heappop(ready)
        assert deadline > index, "earliest deadline first missed a deadline"
        sources[index], earlier[index] = source, number
    indices = tuple(np.flatnonzero(sources == source).astype(np.int32) for source in range(len(counts)))
    return sources, earlier, indices
