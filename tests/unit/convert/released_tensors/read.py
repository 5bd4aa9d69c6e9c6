"""Reads the tensor tables of the released models, `1b.txt` and `7b.txt` in this folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of the original format and the native tensors of the same values."""

    original: str
    shape: Shape
    native: tuple[str, ...]
    """Empty for a tensor that the native format does not have."""
    native_shape: Shape


def released_tensors(preset: str) -> list[Entry]:
    """Every line of a table, written out for each of its numbers."""
    entries = []
    for line in (Path(__file__).parent / f"{preset}.txt").read_text().splitlines():
        if not line.startswith("["):
            continue
        shape, original, native, *other = line.split()
        flat = _shape(shape)
        for name, names in zip(_each(original), _each(native), strict=True):
            parts = [names.replace("{q,k,v}", part) for part in "qkv"] if "{q,k,v}" in names else [names]
            found = () if native == "-" else tuple(parts)
            entries.append(Entry(name, flat, found, _shape(other[0]) if other else flat))
    return entries


def _shape(text: str) -> Shape:
    return tuple(int(part) for part in text.strip("[]").split(","))


def _each(pattern: str) -> list[str]:
    match = re.search(r"\{(\d[\d.,]*)\}", pattern)
    if not match:
        return [pattern]
    first, dots, last = match[1].partition("..")
    numbers = range(int(first), int(last) + 1) if dots else [int(number) for number in first.split(",")]
    return [pattern.replace(match[0], str(number)) for number in numbers]
