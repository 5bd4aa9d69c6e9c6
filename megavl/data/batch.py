"""The contract between data and model: one micro-batch of packed sequences.

Legend: T tokens of the micro-batch (micro-batch size x sequence length), R rows whose next token counts in the loss.
I images, P positions of an image, C canvas side in pixels, V vision towers, W tower width, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megavl.data.manifest import Modality as Modality

INDICES = ("tokens", "positions", "labels", "loss_rows", "image_rows")
"""The integer tensors of a batch."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one data-parallel rank: its sequences, joined into a single row of T tokens.

    The host computes every field once (`make_batch`). The same class travels through the broadcast to the model.

    A segment is a run of positions that attend to each other; positions restart at its first token. Padding at the
    end of a sequence is a segment of its own, so segments cover all T positions.
    """

    modality: Modality
    """Of the step, the same on every rank. With `data.grouping: sequence` a multimodal step may hold batches without
    images."""
    borders: tuple[int, ...]
    """First token of each segment, and T at the end."""
    tokens: torch.Tensor
    """int64 (T,); each image takes P positions that hold the image token id."""
    positions: torch.Tensor
    """int64 (T,), of each token in its segment."""
    labels: torch.Tensor
    """int64 (R,): the token that follows each row of `loss_rows`."""
    loss_rows: torch.Tensor
    """int64 (R,): rows of `tokens` whose label counts in the loss, ascending."""
    image_rows: torch.Tensor
    """int64 (I * P,): rows of `tokens` that hold images, ascending."""
    images: torch.Tensor
    """uint8 (I, 3, C, C): square canvases in the order of their rows. Empty after the first pipeline stage. Under
    `parallel.vision: split_all` first this rank's share of them, then the towers' features (I, V, P, W). Evaluation
    gives embeddings (I, P, H) of images that several prompts share."""
    image_count: int
    """I, on every rank."""
    parents: tuple[int, ...] = ()
    """For each segment, the earlier segment that it continues, or -1; empty: no segment continues another. A token of
    a continuing segment attends to the whole parent too, and its positions go on from the parent's end. It stands
    directly after its parent or a sibling. Evaluation alone makes such segments: options continue their prompt."""
    sample_ids: tuple[int, ...] = ()
    """Global numbers of the packs, for logs of bad steps."""
    sources: tuple[int, ...] = ()
    """For each sequence, the number of its source; empty: not known. Sequences are equally long."""
    bad_samples: tuple[str, ...] = ()
    """Samples that failed to load and count for nothing in the loss: `file:record: reason`."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on a device; `meta` keeps shapes and types alone."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in (*INDICES, "images")}
        return dataclasses.replace(self, **moved)


def make_batch(
    tokens: torch.Tensor,
    *,
    borders: Sequence[int] = (),
    parents: Sequence[int] = (),
    loss_mask: torch.Tensor | None = None,
    images: torch.Tensor | None = None,
    image_token_id: int | None = None,
    modality: Modality | None = None,
    sample_ids: Sequence[int] = (),
    sources: Sequence[int] = (),
    bad_samples: Sequence[str] = (),
) -> Batch:
    """A batch on the host, with everything that follows from its tokens.

    Args:
        tokens: int64 (T,).
        borders: first token of each segment, and T; default: one segment.
        parents: for each segment, the one that it continues, or -1; default: none continues another.
        loss_mask: (T,), nonzero where the next token counts in the loss; default: nowhere.
        images: uint8 (I, 3, C, C); default: none.
        image_token_id: id that marks image positions.
        modality: of the step; default: by whether there are images.
        sample_ids: numbers of the packs.
        sources: numbers of the sources of the sequences.
        bad_samples: samples that failed to load.
    """
    borders = tuple(borders) or (0, len(tokens))
    if images is None:
        images = torch.zeros((0, 3, 1, 1), dtype=torch.uint8)
    image_rows = none = tokens[:0]
    if len(images):
        assert image_token_id is not None, "images come with the id of their positions"
        image_rows = tokens.eq(image_token_id).nonzero().flatten()
    loss_rows = none if loss_mask is None else loss_mask.nonzero().flatten()
    return Batch(
        modality=modality or ("multimodal" if len(images) else "text"),
        borders=borders,
        tokens=tokens,
        positions=_positions(borders, parents),
        labels=tokens.roll(-1)[loss_rows],
        loss_rows=loss_rows,
        image_rows=image_rows,
        images=images,
        image_count=len(images),
        parents=tuple(parents),
        sample_ids=tuple(sample_ids),
        sources=tuple(sources),
        bad_samples=tuple(bad_samples),
    )


def _positions(borders: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
    lengths = [end - start for start, end in zip(borders, borders[1:])]
    starts = [lengths[parent] if parent >= 0 else 0 for parent in parents] or [0] * len(lengths)
    return torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths)])
