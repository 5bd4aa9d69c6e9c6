"""Micro-batches of every step for one data-parallel rank, decoded ahead of time."""

from __future__ import annotations

import sys
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError, UsageError
from megavl.data.batch import Batch, Modality
from megavl.data.collate import LoadedSequence, collate
from megavl.data.dataset import Dataset, PackedSequence
from megavl.data.image import ImageError, blank_canvas
from megavl.data.image_worker import ImagePool
from megavl.data.plan import ModalityPlan
from megavl.data.sampler import PackRef, Sampler

_AHEAD = 2
"""Steps whose images are decoded ahead; each holds its uint8 canvases in memory."""


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A packed sequence whose images are on their way."""

    packed: PackedSequence
    canvases: tuple[tuple[int, Future[npt.NDArray[np.uint8]]], ...]
    """Member number and canvas of each image."""


class StepLoader:
    """Steps in any order, the following ones prefetched. What a step holds depends on (data, seed, step) alone."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        multimodal_fraction: float,
        modality_warmup_steps: int,
        num_workers: int,
        max_bad_in_row: int,
        cross_document_attention: bool,
        total_steps: int,
        start_step: int = 0,
    ) -> None:
        """Plan the run and start decoding its first steps.

        Args:
            dataset: from `open_dataset`.
            seed: of data order and modality plan.
            global_batch_size: sequences per step, over all data-parallel ranks.
            micro_batch_size: sequences per batch.
            dp_rank: this rank's place in its data-parallel group.
            dp_size: ranks in that group.
            multimodal_fraction: target share of multimodal steps.
            modality_warmup_steps: steps over which that share rises from 0.
            num_workers: decoding processes of this rank; 0 decodes in `get`.
            max_bad_in_row: samples in a row that may fail to load.
            cross_document_attention: let attention cross sample borders inside a sequence.
            total_steps: steps of the run; none is prefetched beyond.
            start_step: first step that will be asked for.

        Raises:
            DataError: a modality that the plan needs is missing from the data.
            UsageError: the global batch does not divide.
        """
        if global_batch_size % (dp_size * micro_batch_size):
            raise UsageError(
                f"training.global_batch_size: {global_batch_size} is no multiple of data-parallel ranks {dp_size} x "
                f"training.micro_batch_size {micro_batch_size}"
            )
        plan = ModalityPlan(seed=seed, fraction=multimodal_fraction, warmup_steps=modality_warmup_steps)
        self._sampler = Sampler(dataset.counts, weights=dataset.weights, plan=plan, global_batch_size=global_batch_size)
        self._dataset = dataset
        self._geometry = dataset.geometry
        share = global_batch_size // dp_size
        self._slots = range(dp_rank * share, (dp_rank + 1) * share)
        self._micro_batch_size = micro_batch_size
        self._cross = cross_document_attention
        self._max_bad = max_bad_in_row
        self._bad_in_row = 0
        self._total_steps = total_steps
        self._pool = ImagePool(dataset.geometry, workers=num_workers)
        self._ahead = _AHEAD if num_workers else 0
        self._pending: OrderedDict[int, list[_Pending]] = OrderedDict()
        self._prefetch(start_step)

    def modality(self, step: int) -> Modality:
        """Modality of a step, the same on every rank."""
        return self._sampler.plan.modality(step)

    def global_batch(self, step: int) -> list[PackRef]:
        """All packs of a step, over all data-parallel ranks."""
        return self._sampler.global_batch(step)

    def get(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step.

        A sample that fails to load keeps its place with loss mask 0 and is named in `Batch.bad_samples`.

        Raises:
            DataError: a file vanished, or `max_bad_in_row` samples in a row failed.
            PeerError: a decoding worker gives no answer.
        """
        pending = self._pending.pop(step, None) or self._request(step)
        self._prefetch(step + 1)
        loaded = [self._finish(item) for item in pending]
        size = self._micro_batch_size
        return [
            collate(
                loaded[first : first + size],
                modality=self.modality(step),
                canvas_size=self._geometry.canvas_size,
                cross_document_attention=self._cross,
            )
            for first in range(0, len(loaded), size)
        ]

    def close(self) -> None:
        """End the decoding workers."""
        self._pending.clear()
        self._pool.close()

    def _prefetch(self, first: int) -> None:
        wanted = range(first, min(first + self._ahead, self._total_steps))
        for step in [step for step in self._pending if step not in wanted]:
            for item in self._pending.pop(step):
                for _, future in item.canvases:
                    future.cancel()
        for step in wanted:
            if step not in self._pending:
                self._pending[step] = self._request(step)

    def _request(self, step: int) -> list[_Pending]:
        refs = self._sampler.global_batch(step)
        return [self._start(refs[slot]) for slot in self._slots]

    def _start(self, ref: PackRef) -> _Pending:
        packed = self._dataset.read(source=ref.source, modality=ref.modality, index=ref.index)
        canvases = [
            (number, self._pool.submit(image))
            for number, member in enumerate(packed.members)
            for image in member.images
        ]
        return _Pending(packed=packed, canvases=tuple(canvases))

    def _finish(self, item: _Pending) -> LoadedSequence:
        reasons = {number: member.damage for number, member in enumerate(item.packed.members) if member.damage}
        canvases = []
        for number, future in item.canvases:
            try:
                canvases.append(self._pool.result(future))
            except ImageError as error:
                reasons[number] = f"{error.reason}: {error}"
                canvases.append(blank_canvas(self._geometry))
        bad = []
        for number, member in enumerate(item.packed.members):
            if number not in reasons:
                self._bad_in_row = 0
                continue
            bad.append((number, f"{member.origin}: {reasons[number]}"))
            self._bad_in_row += 1
            print(f"warning: sample skipped, {bad[-1][1]}", file=sys.stderr, flush=True)
            if self._bad_in_row >= self._max_bad:
                raise DataError(
                    f"{bad[-1][1]}; {self._bad_in_row} samples in a row failed to load (data.max_bad_in_row "
                    f"{self._max_bad}); check the shards with data_tools/verify.py and preprocess again"
                )
        return LoadedSequence(packed=item.packed, canvases=tuple(canvases), bad=tuple(bad))
