"""The contract between data and model: one micro-batch of packed sequences.

Legend: T tokens of the micro-batch (micro-batch size x sequence length), N segments, I images, C canvas side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megavl.data.manifest import Modality as Modality


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one data-parallel rank; its sequences stand one after another in a single row.

    A segment is a run of positions that attend to each other; positions restart at its first token. Padding at the
    end of a sequence is a segment of its own with loss mask 0, so segments cover all T positions.
    """

    modality: Modality
    """Of the step, the same on every rank; where modalities are mixed in a step, a multimodal one may hold batches
    without images."""
    tokens: torch.Tensor
    """int64 (T,); each image stands as `image_tokens` copies of the image token id."""
    labels: torch.Tensor
    """int64 (T,): the next token of the same segment; 0 where loss_mask is 0."""
    loss_mask: torch.Tensor
    """float32 (T,): 1 where the label counts."""
    cu_seqlens: torch.Tensor
    """int32 (N + 1,): segment borders, first 0, last T."""
    images: torch.Tensor
    """uint8 (I, 3, C, C): square canvases in the order of their placeholders; I is 0 for text."""
    sample_ids: tuple[int, ...]
    """Global numbers of the packs, for logs of bad steps."""
    bad_samples: tuple[str, ...] = ()
    """Samples whose loss mask was zeroed because they failed to load: `file:place: reason`."""
