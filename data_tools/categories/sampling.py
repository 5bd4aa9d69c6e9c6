"""Samples with given shares of categories, exact at every length of the output.

The order is Tijdeman's ("The chairman assignment problem", 1980): after any number of records, the count of each
category differs from its share by less than one record.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_tools.categories.tree import Taxonomy, read_mapping, within
from megavl.config.errors import DataError, UsageError


def read_weights(path: Path, *, taxonomy: Taxonomy) -> dict[str, Fraction]:
    """Shares that sum to 1, from a YAML mapping of ids to weights; a category includes all below it.

    Raises:
        UsageError: the file is no such mapping, or a category and one below it both have a weight.
        DataError: it names an unknown category.
    """
    where = f"--weights {path}"
    weights = {
        taxonomy.check(id, where=where): _weight(value, where=f"{where}: {id}")
        for id, value in read_mapping(path, option="--weights").items()
    }
    weights = {id: weight for id, weight in weights.items() if weight}
    if not weights:
        raise UsageError(f"{where}: every weight is 0; give one at least that is not")
    for id in weights:
        for other in weights:
            if other != id and within(other, id):
                raise UsageError(f"{where}: {other} is a part of {id}; give a weight to one of the two only")
    total = sum(weights.values())
    return {id: weight / total for id, weight in weights.items()}


def _weight(value: Any, *, where: str) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UsageError(f"{where}: a weight is a number from 0, found {value!r}")
    # The written number: 0.1 is a tenth, not the nearest binary fraction.
    return Fraction(str(value))


def order(shares: Mapping[str, Fraction], *, count: int) -> Iterator[str]:
    """The category of each of `count` records; `shares` are positive and sum to 1."""
    # In whole numbers: everything is multiplied by `whole`, the common denominator, and by `halves`.
    whole = math.lcm(*(share.denominator for share in shares.values()))
    halves = max(2 * len(shares) - 2, 1)
    steps = {id: int(share * whole) for id, share in shares.items()}
    paces = {id: math.lcm(*steps.values()) // step for id, step in steps.items()}
    due = dict.fromkeys(shares, 0)
    for _ in range(count):
        for id, step in steps.items():
            due[id] += step * halves
        # Of the categories that are due, take the one whose deadline comes first.
        ready = [id for id in shares if due[id] >= whole] or list(shares)
        chosen = min(ready, key=lambda id: (whole * (halves - 1) - due[id]) * paces[id])
        due[chosen] -= whole * halves
        yield chosen


def choose(size: int, *, count: int, seed: int, category: str) -> list[int]:
    """Numbers of `count` records out of `size`, in an order set by the seed; none comes twice before all came once."""
    chosen: list[int] = []
    for round_number in range(-(-count // size) if size else 0):
        keys = {n: hashlib.sha256(f"{seed}/{category}/{round_number}/{n}".encode()).digest() for n in range(size)}
        chosen += sorted(range(size), key=keys.__getitem__)
    return chosen[:count]


def check_supply(wanted: Mapping[str, int], found: Mapping[str, int], *, repeat: bool) -> None:
    """Raise DataError unless each category has enough records; with `repeat` one is enough."""
    short = [
        f"{id} has {found.get(id, 0)} of {count}"
        for id, count in wanted.items()
        if found.get(id, 0) < (min(count, 1) if repeat else count)
    ]
    if short:
        advice = "give more data or other weights" if repeat else "give more data, a smaller --count, or --repeat"
        raise DataError(f"--count: too few records: {', '.join(short)}; {advice}")
