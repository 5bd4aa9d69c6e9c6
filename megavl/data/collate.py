"""Packed sequences and their canvases to one `Batch` row.

Legend: S sequence length, b sequences of the micro-batch, T = b x S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megavl.data.batch import Batch, Modality
from megavl.data.dataset import PackedSequence


@dataclass(frozen=True, kw_only=True)
class LoadedSequence:
    """A packed sequence with its pixels."""

    packed: PackedSequence
    canvases: tuple[npt.NDArray[np.uint8], ...]
    """(3, C, C) each, in the order of the placeholders."""
    bad: tuple[tuple[int, str], ...]
    """Members that failed to load: number, and `file:place: reason`."""


def collate(
    sequences: Sequence[LoadedSequence], *, modality: Modality, canvas_size: int, cross_document_attention: bool
) -> Batch:
    """One micro-batch.

    Labels never cross a sample border, whatever attention does. Positions after the last sample are padding: a segment
    of its own with loss mask 0.

    Args:
        sequences: b packed sequences.
        modality: of the step.
        canvas_size: side C in pixels.
        cross_document_attention: one segment per sequence's samples instead of one per sample.

    Returns:
        A batch of T tokens.
    """
    length = len(sequences[0].packed.tokens)
    borders = [0]
    for number, sequence in enumerate(sequences):
        base, members = number * length, sequence.packed.members
        ends = [members[-1].end] if cross_document_attention else [member.end for member in members]
        borders += [base + end for end in dict.fromkeys([*ends, length])]
    targets = [_targets(sequence) for sequence in sequences]
    canvases = [pixels for sequence in sequences for pixels in sequence.canvases]
    images = np.stack(canvases) if canvases else np.empty((0, 3, canvas_size, canvas_size), np.uint8)
    return Batch(
        modality=modality,
        tokens=torch.from_numpy(np.concatenate([s.packed.tokens for s in sequences]).astype(np.int64)),
        labels=torch.from_numpy(np.concatenate([labels for labels, _ in targets])),
        loss_mask=torch.from_numpy(np.concatenate([mask for _, mask in targets])),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        images=torch.from_numpy(images),
        sample_ids=tuple(sequence.packed.number for sequence in sequences),
        bad_samples=tuple(text for sequence in sequences for _, text in sequence.bad),
    )


def _targets(sequence: LoadedSequence) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Labels (S,) and loss mask (S,): position t predicts t + 1 where that is supervised and of the same sample."""
    packed = sequence.packed
    mask = np.zeros(len(packed.tokens), np.float32)
    mask[:-1] = packed.supervised[1:]
    for member in packed.members:
        mask[member.end - 1] = 0
    for number, _ in sequence.bad:
        mask[packed.members[number].start : packed.members[number].end] = 0
    labels = np.zeros(len(packed.tokens), np.int64)
    labels[:-1] = packed.tokens[1:]
    labels[mask == 0] = 0
    return labels, mask
