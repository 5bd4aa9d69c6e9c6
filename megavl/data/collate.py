"""Packed sequences and their canvases to one `Batch`.

Legend: S sequence length, b sequences of the micro-batch, I images, C canvas side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from megavl.data.batch import Batch, Modality, make_batch
from megavl.data.dataset import PackedSequence


def collate(
    sequences: Sequence[PackedSequence],
    *,
    canvases: Sequence[npt.NDArray[np.uint8]],
    canvas_size: int,
    image_token_id: int | None,
    modality: Modality,
    bad_samples: Sequence[str],
    cross_document_attention: bool,
) -> Batch:
    """One micro-batch.

    A label never crosses a sample border, whatever attention does. Positions after the last sample are padding: a
    segment of its own whose labels do not count.

    Args:
        sequences: b packed sequences.
        canvases: (3, C, C) of each image, in the order of their placeholders.
        canvas_size: C.
        image_token_id: id of the placeholders.
        modality: of the step.
        bad_samples: samples that failed to load, already out of `PackedSequence.supervised`.
        cross_document_attention: one segment per sequence's samples instead of one per sample.
    """
    length = len(sequences[0].tokens)
    borders = [0]
    for number, sequence in enumerate(sequences):
        ends = [member.end for member in sequence.members]
        ends = ends[-1:] if cross_document_attention else ends
        borders += [number * length + end for end in dict.fromkeys([*ends, length])]
    images = np.stack(canvases) if canvases else np.empty((0, 3, canvas_size, canvas_size), np.uint8)
    return make_batch(
        torch.from_numpy(np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int64)),
        borders=borders,
        loss_mask=torch.from_numpy(np.concatenate([_loss_mask(sequence) for sequence in sequences])),
        images=torch.from_numpy(images),
        image_token_id=image_token_id,
        modality=modality,
        sample_ids=[sequence.number for sequence in sequences],
        sources=[sequence.source for sequence in sequences],
        bad_samples=bad_samples,
    )


def _loss_mask(sequence: PackedSequence) -> npt.NDArray[np.bool_]:
    """(S,): position t counts where the token at t + 1 is supervised and of the same sample."""
    mask = np.zeros(len(sequence.tokens), np.bool_)
    mask[:-1] = sequence.supervised[1:]
    mask[[member.end - 1 for member in sequence.members]] = False
    return mask
