"""Packing under two limits: tokens and images per sequence. A pure function of lengths and limits.

Samples with images go first, those with most images before others, so that the encoder's work per sequence is nearly
constant. Text then fills the gaps, and the rest of the text is packed alone. Every sample goes to its best fit, found
in a bit set of free room ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830). Ties are broken by sample
number.

The pack of a sample follows from its kind (images and tokens) and from how many of the kind came before it. So packing
needs only the number of samples of each kind. Its result is a list of runs: packs in a row that hold the same kinds.
Memory therefore grows with the kinds, not with the samples.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = Sequence[int] | npt.NDArray[np.int32]
Run = tuple[int, int, int]
"""Successive packs: the first, the step to the next (1 or -1), and how many."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The packs of successive samples."""

    packs: npt.NDArray[np.int64]
    """Pack of each; text packs and multimodal ones are numbered apart."""
    multimodal: npt.NDArray[np.bool_]
    """Whether that is a multimodal pack."""
    kinds: npt.NDArray[np.int32]
    """Samples of one pack are ordered by these, then by their numbers."""


class Kinds:
    """How many samples there are of each number of images and tokens."""

    def __init__(self, *, seq_length: int, max_images: int) -> None:
        """Args: the limits of a sequence."""
        self.seq_length, self.max_images = seq_length, max_images
        self._found: Counter[int] = Counter()

    def add(self, lengths: Counts, *, images: Counts) -> None:
        """Count samples of 1 to `seq_length` tokens and 0 to `max_images` images."""
        tokens, slots = np.asarray(lengths, np.int32), np.asarray(images, np.int32)
        assert ((tokens > 0) & (tokens <= self.seq_length)).all(), "preprocessing cuts or drops over-long samples"
        assert ((slots >= 0) & (slots <= self.max_images)).all(), "preprocessing drops samples with too many images"
        keys, counts = np.unique(self.keys(tokens, slots), return_counts=True)
        self._found.update(dict(zip(keys.tolist(), counts.tolist())))

    def keys(self, lengths: npt.NDArray[np.int32], images: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """One number per sample; ascending: most images first, then most tokens."""
        room = self.seq_length + 1
        return (self.max_images - images.astype(np.int64)) * room + (self.seq_length - lengths)

    def table(self) -> npt.NDArray[np.int64]:
        """(kinds, 4): key, tokens, images and number of samples, by key."""
        keys = np.array(sorted(self._found), np.int64)
        counts = np.array([self._found[key] for key in keys.tolist()], np.int64)
        free, short = np.divmod(keys, self.seq_length + 1)
        return np.stack([keys, self.seq_length - short, self.max_images - free, counts], axis=1)


class Packing:
    """The packs of all samples; `cursor` returns them sample by sample."""

    def __init__(self, kinds: Kinds, *, packed: bool = True) -> None:
        """Divide samples into sequences.

        Args:
            kinds: all samples.
            packed: False puts every sample into a sequence of its own.
        """
        self._kinds = kinds
        self._runs = _Runs()
        table = kinds.table()
        self._keys, counts = table[:, 0], table[:, 3]
        self._firsts = np.cumsum(counts) - counts
        self._packed = packed
        if not packed:
            self.multimodal = int(counts[table[:, 2] > 0].sum())
            self.text = int(counts.sum()) - self.multimodal
            return
        bins = _Bins(kinds.seq_length, slots=kinds.max_images, runs=self._runs, mixed=True)
        alone = _Bins(kinds.seq_length, slots=0, runs=self._runs, mixed=False)
        for _, length, slots, count in table.tolist():
            if slots:
                bins.place(count, length, slots=slots)
            else:
                alone.place(bins.fill(count, length), length, slots=0)
        self._runs.close()
        self.text, self.multimodal = alone.count, bins.count

    def cursor(self) -> Cursor:
        """A walk over the samples from the first one on."""
        return Cursor(self._kinds, self._keys, self._firsts, None if not self._packed else self._runs)


class Cursor:
    """Goes through the samples in their order, block by block."""

    def __init__(
        self, kinds: Kinds, keys: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64], runs: _Runs | None
    ) -> None:
        """Args: what `Packing` found; runs None: every sample for itself."""
        self._kinds, self._keys, self._runs = kinds, keys, runs
        self._next = firsts.copy()
        self._alone = np.zeros(2, np.int64)

    def place(self, lengths: Counts, *, images: Counts) -> Placed:
        """The packs of the next samples."""
        tokens, slots = np.asarray(lengths, np.int32), np.asarray(images, np.int32)
        if self._runs is None:
            mixed = slots > 0
            packs = np.where(mixed, self._alone[1] + np.cumsum(mixed), self._alone[0] + np.cumsum(~mixed)) - 1
            self._alone += [len(mixed) - int(mixed.sum()), int(mixed.sum())]
            return Placed(packs=packs, multimodal=mixed, kinds=np.zeros(len(mixed), np.int32))
        kinds = np.searchsorted(self._keys, self._kinds.keys(tokens, slots))
        order = np.argsort(kinds, kind="stable")
        found, starts, counts = np.unique(kinds[order], return_index=True, return_counts=True)
        places = np.empty(len(kinds), np.int64)
        places[order] = np.arange(len(kinds)) + np.repeat(self._next[found] - starts, counts)
        self._next[found] += counts
        packs, mixed = self._runs.at(places)
        return Placed(packs=packs, multimodal=mixed, kinds=kinds.astype(np.int32))


class _Runs:
    """Packs in the order in which they were filled; `each` samples alike went into every pack of a run."""

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in ("start", "first", "step", "each", "mixed")}
        self._arrays: dict[str, npt.NDArray[np.int64]] = {}
        self._samples = 0

    def append(self, run: Run, *, each: int, samples: int, mixed: bool) -> int:
        """Add packs for at most `samples` samples; returns how many they take."""
        for name, value in zip(self._columns, (self._samples, run[0], run[1], each, mixed)):
            self._columns[name].append(value)
        taken = min(samples, run[2] * each)
        self._samples += taken
        return taken

    def close(self) -> None:
        self._arrays = {name: np.array(column, np.int64) for name, column in self._columns.items()}

    def at(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Pack and modality of samples by their number in the order of placement."""
        rows, columns = np.searchsorted(self._arrays["start"], places, side="right") - 1, self._arrays
        steps = (places - columns["start"][rows]) // columns["each"][rows]
        return columns["first"][rows] + columns["step"][rows] * steps, columns["mixed"][rows] > 0


class _Bins:
    """Open packs, findable by free image slots and free tokens."""

    def __init__(self, seq_length: int, *, slots: int, runs: _Runs, mixed: bool) -> None:
        self._seq_length, self._slots = seq_length, slots
        self._runs, self._mixed = runs, mixed
        self.count = 0
        self._shelves = [_Shelf() for _ in range(slots + 1)]
        self._gaps: _Shelf | None = None

    def place(self, left: int, length: int, *, slots: int) -> None:
        """Best fit of samples alike: fewest free image slots first, then least free room; else new packs.

        A pack that took one of them stays the best fit for the next as long as it has room. So it takes all that it can
        at once, and the packs next to it follow in the same way.
        """
        while left:
            for free in range(slots, self._slots + 1):
                room = self._shelves[free].best(length)
                if room:
                    break
            else:
                room, free = 0, self._slots
            size = room or self._seq_length
            each = min(size // length, free // slots) if slots else size // length
            packs = -(-left // each)
            if room:
                run = self._shelves[free].take(room, packs)
            else:
                run = (self.count, 1, packs)
                self.count += packs
            samples = self._runs.append(run, each=each, samples=left, mixed=self._mixed)
            for part, count in _parts(run, each=each, samples=samples):
                self._shelves[free - slots * count].put(size - length * count, part)
            left -= samples

    def fill(self, left: int, length: int) -> int:
        """Put samples without images into the gaps, whatever image slots are free; returns how many fit nowhere."""
        if self._gaps is None:
            self._gaps = _Shelf()
            for shelf in self._shelves:
                self._gaps.merge(shelf)
        while left and (room := self._gaps.best(length)):
            each = room // length
            run = self._gaps.take(room, -(-left // each))
            samples = self._runs.append(run, each=each, samples=left, mixed=self._mixed)
            for part, count in _parts(run, each=each, samples=samples):
                self._gaps.put(room - length * count, part)
            left -= samples
        return left


def _parts(run: Run, *, each: int, samples: int) -> Iterator[tuple[Run, int]]:
    """The packs of a run that took `each` samples, and the last one that took fewer."""
    first, step, _ = run
    full, rest = divmod(samples, each)
    if full:
        yield (first, step, full), each
    if rest:
        yield (first + step * full, 1, 1), rest


class _Shelf:
    """Packs by free room; the bit set makes 'least room that suffices' a few integer operations."""

    def __init__(self) -> None:
        self._bits = 0
        self._by_room: dict[int, list[Run]] = {}

    def put(self, room: int, run: Run) -> None:
        """Put packs on their pile, one after the other."""
        if not room:
            return
        pile = self._by_room.setdefault(room, [])
        if pile and (joined := _joined(pile[-1], run)):
            pile[-1] = joined
        else:
            pile.append(run)
        self._bits |= 1 << room

    def best(self, length: int) -> int:
        """The least room that suffices; 0 if there is none."""
        fitting = self._bits >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else 0

    def take(self, room: int, most: int) -> Run:
        """Packs from the top of a pile, in the order in which they come off."""
        pile = self._by_room[room]
        first, step, count = pile.pop()
        taken = min(count, most)
        if taken < count:
            pile.append((first, step, count - taken))
        elif not pile:
            self._bits ^= 1 << room
        return first + step * (count - 1), -step, taken

    def merge(self, other: _Shelf) -> None:
        for room, pile in other._by_room.items():
            for run in pile:
                self.put(room, run)


def _joined(lower: Run, upper: Run) -> Run | None:
    """Two runs as one, where the second goes on where the first ends."""
    end = lower[0] + lower[1] * (lower[2] - 1)
    step = upper[0] - end
    straight = all(run[2] == 1 or run[1] == step for run in (lower, upper))
    return (lower[0], step, lower[2] + upper[2]) if step in (1, -1) and straight else None
