"""Micro-batches of every step for one data-parallel rank, with prefetch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from megavl.config.errors import DataError, UsageError
from megavl.data.batch import Batch, Modality
from megavl.data.collate import collate
from megavl.data.dataset import Dataset, PackedSequence
from megavl.data.image import ImageError, blank_canvas
from megavl.data.image_pool import ImagePool
from megavl.data.image_worker import Canvas
from megavl.data.sampler import Sampler
from megavl.foreign.printing import say

_PREFETCHED_STEPS = 4
"""Steps whose sequences are prefetched, as far as `prefetch_images` allows."""


class StepLoader:
    """Returns steps in any order and prefetches the following ones.

    What a step holds depends on (data, seed, step) alone.
    """

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
            dp_rank: this rank's number in its data-parallel group.
            dp_size: ranks in that group.
            num_workers: decoding processes of this rank; 0 decodes in `get`.
            prefetch_images: most images that are decoded or waiting, apart from those of the current sequence.
            max_bad_in_row: samples in a row that may fail to load; those with images are counted apart from text.
            cross_document_attention: let attention cross sample borders inside a sequence.
            total_steps: steps of the run; later ones are not prefetched.
            start_step: first step that will be requested.
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
        self._pending: deque[tuple[PackedSequence, list[Future[Canvas]]]] = deque()
        """Sequences whose images are being decoded, with a future for each image."""
        self._next = self._end = start_step * self._share
        """Sequences of this rank, counted from the first step: the next to be handed out, and the next to be read."""
        self._images = 0
        """Images of pending sequences."""
        self._prefetch()

    def modality(self, step: int) -> Modality:
        """Modality of a step, the same on every rank."""
        return self._sampler.mixture.modality(step)

    def get(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step.

        A sample that fails to load keeps its positions, counts for nothing in the loss and is named in
        `Batch.bad_samples`.

        Raises:
            DataError: a file vanished, or `max_bad_in_row` samples in a row failed.
            PeerError: decoding processes cannot start or give no answer.
        """
        if step * self._share != self._next:
            self._go_to(step)
        return [self._micro_batch(self.modality(step)) for _ in range(self._share // self._micro_batch_size)]

    def close(self) -> None:
        """End the decoding workers."""
        self._pending.clear()
        self._pool.close()

    def _go_to(self, step: int) -> None:
        for _, futures in self._pending:
            for future in futures:
                future.cancel()
        self._pending.clear()
        self._images = 0
        self._next = self._end = step * self._share

    def _micro_batch(self, modality: Modality) -> Batch:
        sequences: list[PackedSequence] = []
        canvases: list[Canvas] = []
        bad: list[str] = []
        for _ in range(self._micro_batch_size):
            if not self._pending:
                self._read_next()
            sequence, futures = self._pending.popleft()
            canvases += self._finish(sequence, futures, bad=bad)
            sequences.append(sequence)
            self._next += 1
            self._images -= len(futures)
            self._prefetch()
        return collate(
            sequences,
            canvases=canvases,
            canvas_size=self._geometry.canvas_size,
            image_token_id=self._dataset.image_id,
            modality=modality,
            bad_samples=bad,
            cross_document_attention=self._cross,
        )

    def _prefetch(self) -> None:
        last = min(self._next // self._share + _PREFETCHED_STEPS, self._total_steps) * self._share
        while self._images < self._max_images and self._end < last:
            self._read_next()

    def _read_next(self) -> None:
        """Read the tokens of the next sequence and have its images decoded."""
        step, slot = divmod(self._end, self._share)
        ref = self._sampler.sample(step=step, slot=self._first_slot + slot)
        sequence = self._dataset.read(source=ref.source, modality=ref.modality, index=ref.index)
        futures = [self._pool.submit(image) for member in sequence.members for image in member.images]
        self._pending.append((sequence, futures))
        self._images += len(futures)
        self._end += 1

    def _finish(self, sequence: PackedSequence, futures: Sequence[Future[Canvas]], *, bad: list[str]) -> list[Canvas]:
        """The sequence's canvases; members that failed to load lose their loss and are added to `bad`."""
        waiting, canvases = iter(futures), []
        for member in sequence.members:
            reason = member.damage
            for _ in member.images:
                try:
                    canvases.append(next(waiting).result())
                except ImageError as error:
                    reason = f"{error.reason}: {error}"
                    canvases.append(blank_canvas(self._geometry))
            # Counted apart, or the text between damaged images would hide that all of them are.
            kind = bool(member.images)
            self._bad_in_row[kind] = self._bad_in_row[kind] + 1 if reason else 0
            if reason:
                sequence.supervised[member.start : member.end] = False
                bad.append(f"{member.origin}: {reason}")
                self._report(bad[-1], in_row=self._bad_in_row[kind])
        return canvases

    def _report(self, text: str, *, in_row: int) -> None:
        say(f"warning: sample skipped, {text}", to_errors=True)
        if in_row >= self._max_bad:
            raise DataError(
                f"{text}; {in_row} samples in a row failed to load (data.max_bad_in_row {self._max_bad}); check the "
                "shards with data_tools/verify.py and preprocess again"
            )
