"""Micro-batches of every step for one data-parallel rank, decoded ahead of time."""

from __future__ import annotations

import sys
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError, UsageError
from megavl.data.batch import Batch, Modality
from megavl.data.collate import LoadedSequence, collate
from megavl.data.dataset import Dataset, PackedSequence
from megavl.data.image import ImageError, blank_canvas
from megavl.data.image_pool import ImagePool
from megavl.data.sampler import PackRef, Sampler

_STEPS_AHEAD = 4
"""Steps whose sequences are read ahead, as far as `prefetch_images` allows."""


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
        sampler: Sampler,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int,
        prefetch_images: int,
        max_bad_in_row: int,
        cross_document_attention: bool,
        total_steps: int,
        start_step: int = 0,
        worker_timeout_s: float = 120.0,
    ) -> None:
        """Start decoding the first steps.

        Args:
            dataset: from `open_dataset`.
            sampler: which packs each step holds.
            micro_batch_size: sequences per batch.
            dp_rank: this rank's place in its data-parallel group.
            dp_size: ranks in that group.
            num_workers: decoding processes of this rank; 0 decodes in `get`.
            prefetch_images: images that may be decoded or waiting to be, beside those of the sequence in hand.
            max_bad_in_row: samples in a row, with images or without, that may fail to load.
            cross_document_attention: let attention cross sample borders inside a sequence.
            total_steps: steps of the run; none is prefetched beyond.
            start_step: first step that will be asked for.
            worker_timeout_s: after which a silent decoding process is replaced.

        Raises:
            UsageError: the global batch does not divide.
        """
        global_batch_size = sampler.mixture.global_batch_size
        if global_batch_size % (dp_size * micro_batch_size):
            raise UsageError(
                f"training.global_batch_size: {global_batch_size} is no multiple of data-parallel ranks {dp_size} x "
                f"training.micro_batch_size {micro_batch_size}"
            )
        self._sampler = sampler
        self._dataset = dataset
        self._geometry = dataset.geometry
        self._share = global_batch_size // dp_size
        self._first_slot = dp_rank * self._share
        self._micro_batch_size = micro_batch_size
        self._cross = cross_document_attention
        self._max_bad = max_bad_in_row
        self._bad_in_row = {True: 0, False: 0}
        self._total_steps = total_steps
        self._pool = ImagePool(dataset.geometry, workers=num_workers, timeout_s=worker_timeout_s)
        self._max_images = prefetch_images if num_workers else 0
        self._pending: deque[_Pending] = deque()
        self._place = self._end = start_step * self._share
        """Sequences of this rank, counted from the first step: the next to be handed out, and the next to be read."""
        self._images = 0
        """Images of pending sequences."""
        self._prefetch()

    def modality(self, step: int) -> Modality:
        """Modality of a step, the same on every rank."""
        return self._sampler.mixture.modality(step)

    def get(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step.

        A sample that fails to load keeps its place with loss mask 0 and is named in `Batch.bad_samples`.

        Raises:
            DataError: a file vanished, or `max_bad_in_row` samples in a row failed.
            PeerError: decoding processes cannot start or give no answer.
        """
        if step * self._share != self._place:
            self._go_to(step)
        return [self._micro_batch(self.modality(step)) for _ in range(self._share // self._micro_batch_size)]

    def close(self) -> None:
        """End the decoding workers."""
        self._pending.clear()
        self._pool.close()

    def _go_to(self, step: int) -> None:
        for item in self._pending:
            for _, future in item.canvases:
                future.cancel()
        self._pending.clear()
        self._images = 0
        self._place = self._end = step * self._share

    def _micro_batch(self, modality: Modality) -> Batch:
        loaded = []
        for _ in range(self._micro_batch_size):
            if not self._pending:
                self._read_next()
            item = self._pending.popleft()
            loaded.append(self._finish(item))
            self._place += 1
            self._images -= len(item.canvases)
            self._prefetch()
        return collate(
            loaded,
            modality=modality,
            canvas_size=self._geometry.canvas_size,
            cross_document_attention=self._cross,
        )

    def _prefetch(self) -> None:
        last = min(self._place // self._share + _STEPS_AHEAD, self._total_steps) * self._share
        while self._images < self._max_images and self._end < last:
            self._read_next()

    def _read_next(self) -> None:
        """Read the tokens of the next sequence and have its images decoded."""
        step, slot = divmod(self._end, self._share)
        item = self._start(self._sampler.sample(step=step, slot=self._first_slot + slot))
        self._pending.append(item)
        self._images += len(item.canvases)
        self._end += 1

    def _start(self, ref: PackRef) -> _Pending:
        packed = self._dataset.read(source=ref.source, modality=ref.modality, index=ref.index)
        canvases = [
            (number, self._pool.submit(image))
            for number, member in enumerate(packed.members)
            for image in member.images
        ]
        return _Pending(packed=packed, canvases=tuple(canvases))

    def _finish(self, item: _Pending) -> LoadedSequence:
        members = item.packed.members
        reasons = {number: member.damage for number, member in enumerate(members) if member.damage}
        canvases = []
        for number, future in item.canvases:
            try:
                canvases.append(future.result())
            except ImageError as error:
                reasons[number] = f"{error.reason}: {error}"
                canvases.append(blank_canvas(self._geometry))
        bad = [(number, f"{members[number].origin}: {reason}") for number, reason in sorted(reasons.items())]
        for number, member in enumerate(members):
            # Counted apart, or the text between damaged images would hide that all of them are.
            kind = bool(member.images)
            self._bad_in_row[kind] = self._bad_in_row[kind] + 1 if number in reasons else 0
            if number in reasons:
                self._report(f"{member.origin}: {reasons[number]}", in_row=self._bad_in_row[kind])
        return LoadedSequence(packed=item.packed, canvases=tuple(canvases), bad=tuple(bad))

    def _report(self, text: str, *, in_row: int) -> None:
        print(f"warning: sample skipped, {text}", file=sys.stderr, flush=True)
        if in_row >= self._max_bad:
            raise DataError(
                f"{text}; {in_row} samples in a row failed to load (data.max_bad_in_row {self._max_bad}); check the "
                "shards with data_tools/verify.py and preprocess again"
            )
