"""Packing under two limits: tokens and images per sequence. A pure function of lengths and limits.

Samples with images go first, most images first, so that the encoder's work per sequence is nearly constant; text then
fills the gaps, and the rest of the text is packed alone. All placements are best fit over a bit set of free room
("Fewer Truncations Improve Language Modeling", arXiv 2404.10830). Ties are broken by sample number.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

Counts = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Sequences, in a few bytes per sample."""

    samples: npt.NDArray[np.int64]
    """Sample numbers, pack after pack, in sequence order."""
    packs: npt.NDArray[np.int32]
    """Pack of each, ascending."""
    count: int

    def lists(self) -> list[list[int]]:
        """Sample numbers of each pack."""
        borders = np.searchsorted(self.packs, np.arange(1, self.count))
        return [part.tolist() for part in np.split(self.samples, borders)] if self.count else []


def pack(
    lengths: Counts, *, images: Counts, seq_length: int, max_images: int, packed: bool = True
) -> tuple[Packs, Packs]:
    """Divide samples into sequences.

    Args:
        lengths: tokens of each sample, 1 to `seq_length`.
        images: images of each sample, 0 to `max_images`.
        seq_length: token limit of a sequence.
        max_images: image limit of a sequence.
        packed: False puts every sample into a sequence of its own.

    Returns:
        Text packs and multimodal packs.
    """
    tokens, slots = np.asarray(lengths, np.int32), np.asarray(images, np.int32)
    assert ((tokens > 0) & (tokens <= seq_length)).all(), "preprocessing cuts or drops over-long samples"
    assert ((slots >= 0) & (slots <= max_images)).all(), "preprocessing drops samples with too many images"
    if not packed:
        return _one_each(np.flatnonzero(slots == 0)), _one_each(np.flatnonzero(slots))
    bins, alone = _Bins(seq_length, slots=max_images), _Bins(seq_length, slots=0)
    for count, length, numbers in _alike(tokens, slots):
        if count:
            bins.place(numbers, length, slots=count)
        else:
            alone.place(bins.fill(numbers, length), length, slots=0)
    return alone.packs(), bins.packs()


def _one_each(numbers: npt.NDArray[np.int64]) -> Packs:
    return Packs(samples=numbers, packs=np.arange(len(numbers), dtype=np.int32), count=len(numbers))


def _alike(
    tokens: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]
) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """Images, tokens and numbers of the samples that are alike; most images first, then most tokens."""
    order = np.lexsort((-tokens, -slots))
    tokens, slots = tokens[order], slots[order]
    borders = np.flatnonzero((np.diff(tokens, prepend=0) != 0) | (np.diff(slots, prepend=-1) != 0)).tolist()
    for start, end in zip(borders, [*borders[1:], len(order)]):
        yield int(slots[start]), int(tokens[start]), order[start:end]


class _Bins:
    """Open packs, findable by free image slots and free tokens."""

    def __init__(self, seq_length: int, *, slots: int) -> None:
        self._seq_length, self._slots = seq_length, slots
        self._count = 0
        self._samples: list[npt.NDArray[np.int64]] = []
        self._packs = array("i")
        self._shelves = [_Shelf() for _ in range(slots + 1)]
        self._gaps: _Shelf | None = None

    def place(self, numbers: npt.NDArray[np.int64], length: int, *, slots: int) -> None:
        """Best fit of samples alike, one by one: fewest free image slots first, then least free room; else a new pack.

        A pack that took one of them stays the best fit for the next as long as it has room, so it takes all that
        it can at once.
        """
        left = len(numbers)
        while left:
            for free in range(slots, self._slots + 1):
                taken = self._shelves[free].take(length)
                if taken is not None:
                    room, which = taken
                    break
            else:
                room, which, free = self._seq_length, self._count, self._slots
                self._count += 1
            count = min(left, room // length, free // slots) if slots else min(left, room // length)
            left -= count
            self._packs.extend(repeat(which, count))
            self._shelves[free - slots * count].put(room - length * count, which)
        self._samples.append(numbers)

    def fill(self, numbers: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Put samples without images into the gaps, whatever image slots are free; returns those that fit nowhere."""
        if self._gaps is None:
            self._gaps = _Shelf()
            for shelf in self._shelves:
                self._gaps.merge(shelf)
        left = len(numbers)
        while left and (taken := self._gaps.take(length)) is not None:
            room, which = taken
            count = min(left, room // length)
            left -= count
            self._packs.extend(repeat(which, count))
            self._gaps.put(room - length * count, which)
        placed = len(numbers) - left
        self._samples.append(numbers[:placed])
        return numbers[placed:]

    def packs(self) -> Packs:
        """What was placed, pack after pack."""
        owners = np.array(self._packs, np.int32)
        order = np.argsort(owners, kind="stable")
        samples = np.concatenate([np.zeros(0, np.int64), *self._samples])
        return Packs(samples=samples[order], packs=owners[order], count=self._count)


class _Shelf:
    """Packs by free room; the bit set makes 'least room that suffices' a few integer operations."""

    def __init__(self) -> None:
        self._bits = 0
        self._by_room: dict[int, list[int]] = {}

    def put(self, room: int, which: int) -> None:
        if room:
            self._by_room.setdefault(room, []).append(which)
            self._bits |= 1 << room

    def take(self, length: int) -> tuple[int, int] | None:
        fitting = self._bits >> length
        if not fitting:
            return None
        room = length + (fitting & -fitting).bit_length() - 1
        stack = self._by_room[room]
        which = stack.pop()
        if not stack:
            self._bits ^= 1 << room
        return room, which

    def merge(self, other: _Shelf) -> None:
        for room, stack in other._by_room.items():
            for which in stack:
                self.put(room, which)
