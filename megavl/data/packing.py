"""Packing under two limits: tokens and images per sequence. A pure function of lengths and limits.

Samples with images go first, most images first, so that the encoder's work per sequence is nearly constant; text then
fills the gaps, and the rest of the text is packed alone. All placements are best fit over a bit set of free room
("Fewer Truncations Improve Language Modeling", arXiv 2404.10830). Ties are broken by sample number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Packs = list[list[int]]


def pack(
    lengths: Sequence[int], *, images: Sequence[int], seq_length: int, max_images: int, packed: bool = True
) -> tuple[Packs, Packs]:
    """Divide samples into sequences.

    Args:
        lengths: tokens of each sample, 1 to `seq_length`.
        images: images of each sample, 0 to `max_images`.
        seq_length: token limit of a sequence.
        max_images: image limit of a sequence.
        packed: False puts every sample into a sequence of its own.

    Returns:
        Text packs and multimodal packs; a pack lists sample numbers in sequence order.
    """
    assert all(0 < length <= seq_length for length in lengths), "preprocessing cuts or drops over-long samples"
    assert all(0 <= count <= max_images for count in images), "preprocessing drops samples with too many images"
    text = [number for number, count in enumerate(images) if not count]
    pictures = [number for number, count in enumerate(images) if count]
    if not packed:
        return [[number] for number in text], [[number] for number in pictures]
    bins = _Bins(seq_length)
    for number in sorted(pictures, key=lambda n: (-images[n], -lengths[n], n)):
        bins.place(number, lengths[number], slots=images[number], fresh_slots=max_images)
    rest = bins.fill(sorted(text, key=lambda n: (-lengths[n], n)), lengths)
    alone = _Bins(seq_length)
    for number in rest:
        alone.place(number, lengths[number], slots=0, fresh_slots=0)
    return alone.packs, bins.packs


class _Bins:
    """Open packs, findable by free image slots and free tokens."""

    def __init__(self, seq_length: int) -> None:
        self.packs: Packs = []
        self._seq_length = seq_length
        self._shelves: dict[int, _Shelf] = {}

    def place(self, number: int, length: int, *, slots: int, fresh_slots: int) -> None:
        """Best fit: fewest free image slots first, then least free room; else a new pack."""
        for free in range(slots, fresh_slots + 1):
            shelf = self._shelves.get(free)
            taken = shelf.take(length) if shelf else None
            if taken is not None:
                room, which = taken
                break
        else:
            room, which, free = self._seq_length, len(self.packs), fresh_slots
            self.packs.append([])
        self.packs[which].append(number)
        self._shelf(free - slots).put(room - length, which)

    def fill(self, numbers: Iterable[int], lengths: Sequence[int]) -> list[int]:
        """Put samples without images into the gaps of existing packs; returns those that fit nowhere."""
        gaps = _Shelf()
        for free in sorted(self._shelves):
            gaps.merge(self._shelves[free])
        self._shelves = {}
        rest = []
        for number in numbers:
            taken = gaps.take(lengths[number])
            if taken is None:
                rest.append(number)
                continue
            room, which = taken
            self.packs[which].append(number)
            gaps.put(room - lengths[number], which)
        return rest

    def _shelf(self, free: int) -> _Shelf:
        return self._shelves.setdefault(free, _Shelf())


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
