"""Packing of a list of samples in one call, all in memory, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megavl.data.packing import Counts, Kinds, Packing


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Sequences, in a few bytes per sample."""

    samples: npt.NDArray[np.int64]
    """Sample numbers, pack after pack, in sequence order."""
    packs: npt.NDArray[np.int64]
    """Pack of each, ascending."""
    count: int

    def lists(self) -> list[list[int]]:
        """Sample numbers of each pack."""
        borders = np.searchsorted(self.packs, np.arange(1, self.count))
        return [part.tolist() for part in np.split(self.samples, borders)] if self.count else []


def pack(
    lengths: Counts, *, images: Counts, seq_length: int, max_images: int, packed: bool = True
) -> tuple[Packs, Packs]:
    """Divide samples into sequences, all in memory.

    Args:
        lengths: tokens of each sample, 1 to `seq_length`.
        images: images of each sample, 0 to `max_images`.
        seq_length: token limit of a sequence.
        max_images: image limit of a sequence.
        packed: False puts every sample into a sequence of its own.

    Returns:
        Text packs and multimodal packs.
    """
    kinds = Kinds(seq_length=seq_length, max_images=max_images)
    kinds.add(lengths, images=images)
    packing = Packing(kinds, packed=packed)
    placed = packing.cursor().place(lengths, images=images)
    parts = []
    for mixed, count in ((False, packing.text), (True, packing.multimodal)):
        samples = np.flatnonzero(placed.multimodal == mixed)
        samples = samples[np.lexsort((placed.kinds[samples], placed.packs[samples]))]
        parts.append(Packs(samples=samples, packs=placed.packs[samples], count=count))
    return parts[0], parts[1]
