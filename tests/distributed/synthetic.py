"""Deterministic batches for tests that compare layouts; no files of real data needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavl.config.model import ModelConfig
from megavl.data.batch import Batch, make_batch

SOURCES = 3
"""Of which every sequence has one, by its slot."""


class SyntheticSteps:
    """Global batches that depend on (step, slot) alone: the share of one data-parallel rank.

    Every sequence packs two documents of uneven length and a padding tail; image counts are uneven.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        modality: str,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        image_counts: Sequence[int] = (1, 2),
    ) -> None:
        """Sequence `slot` of multimodal step `step` holds `image_counts[(step + slot) % len]` images, at most 2."""
        self.config, self.modality, self.seq_length = config, modality, seq_length
        self.micro_batch_size, self.image_counts = micro_batch_size, image_counts
        share = global_batch_size // dp_size
        self.slots = range(dp_rank * share, (dp_rank + 1) * share)

    def get(self, step: int) -> list[Batch]:
        """This rank's micro-batches."""
        size = self.micro_batch_size
        return [self._batch(step, self.slots[i : i + size]) for i in range(0, len(self.slots), size)]

    def _batch(self, step: int, slots: range) -> Batch:
        sequences = [self._sequence(step, slot) for slot in slots]
        borders = [0]
        for index, (_, _, lengths, _) in enumerate(sequences):
            for length in lengths:
                borders.append(borders[-1] + length)
            assert borders[-1] == (index + 1) * self.seq_length
        return make_batch(
            torch.cat([s[0] for s in sequences]),
            borders=borders,
            loss_mask=torch.cat([s[1] for s in sequences]),
            images=torch.cat([s[3] for s in sequences]),
            image_token_id=self.config.image_token_id,
            modality=self.modality,
            sample_ids=slots,
            sources=[slot % SOURCES for slot in slots],
        )

    def _sequence(self, step: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
        generator = torch.Generator().manual_seed(1 + step * 1009 + slot)
        length, image_id = self.seq_length, self.config.image_token_id
        tokens = torch.randint(image_id + 1, self.config.llm.vocab_size, (length,), generator=generator)
        cut = int(torch.randint(length // 3, length // 2, (1,), generator=generator))
        pad = int(torch.randint(1, 9, (1,), generator=generator))
        lengths = [cut, length - cut - pad, pad]
        counts = self.image_counts
        count = counts[(step + slot) % len(counts)] if self.modality == "multimodal" else 0
        canvas = self.config.canvas_size
        images = torch.randint(0, 256, (count, 3, canvas, canvas), generator=generator, dtype=torch.uint8)
        for start in (2, cut + 3)[:count]:
            tokens[start : start + self.config.image_tokens] = image_id
        mask = torch.roll(tokens, -1) != image_id
        mask[cut - 1] = 0
        mask[length - pad - 1 :] = 0
        return tokens, mask, lengths, images
