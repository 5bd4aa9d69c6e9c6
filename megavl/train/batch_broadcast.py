"""A step's micro-batches on every rank that needs them.

Legend: I images of the step, C canvas side in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Protocol

import torch

from megavl.config.errors import DataError
from megavl.data.batch import INDICES, Batch
from megavl.parallel import broadcast, cpu_runtime


class StepSource(Protocol):
    """What the loading rank asks for data."""

    def get(self, step: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of a step."""


class StepPrefetcher:
    """A step source that loads the next step in a thread while the device computes this one.

    Images come in page-locked memory where CUDA is; those of two steps are on the host then. A CPU run does without
    the thread, which would take time from the cores that train.
    """

    def __init__(self, source: StepSource, *, steps: int) -> None:
        """Nothing is loaded yet.

        Args:
            source: asked by one thread, a step at a time.
            steps: of the run; none is loaded beyond.
        """
        self._source, self._steps = source, steps
        device = cpu_runtime.device()
        self._thread = ThreadPoolExecutor(1, "megavl-next-step", initializer=_use, initargs=(device,))
        self._coming: dict[int, Future[list[Batch]]] = {}

    def get(self, step: int) -> list[Batch]:
        """The step's micro-batches; starts to load the following step. Raises what the source raised."""
        coming = self._coming.pop(step, None) or self._start(step)
        found = coming.result()
        if step + 1 < self._steps:
            self._coming[step + 1] = self._start(step + 1)
        return found

    def close(self) -> None:
        """Wait until the thread has left the source."""
        self._thread.shutdown(cancel_futures=True)

    def _start(self, step: int) -> Future[list[Batch]]:
        return self._thread.submit(lambda: [_lock_images(batch) for batch in self._source.get(step)])


def _use(device: torch.device) -> None:
    """Let this thread lock its pages through the rank's own GPU, not the first."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def next_step(source: StepSource | None, step: int, *, split_all: bool = False) -> tuple[Batch, ...]:
    """Load a step on the source rank and share it.

    Args:
        source: on the rank for which `broadcast.is_source()` holds; None elsewhere.
        step: 0 for the first.
        split_all: give every rank its share of the step's images, instead of all to the first stage.

    Returns:
        The replica's micro-batches on the device. Every rank gets the integers of all of them in one message; images
        go only to the ranks that encode them.

    Raises:
        DataError: loading failed; the same on every rank of the model-parallel group.
    """
    batches: list[Batch] = []
    problem = ""
    if source is not None:
        try:
            batches = [_lock_images(batch) for batch in source.get(step)]
        except DataError as error:
            problem = str(error)
    problem, described = broadcast.share_object((problem, [batch.to("meta") for batch in batches]))
    if problem:
        raise DataError(problem)
    parts = _share_indices(batches, described)
    total = sum(batch.image_count for batch in described)
    shape = (total, *described[0].images.shape[1:])
    held, images = broadcast.share_images([batch.images for batch in batches], shape=shape, split=split_all)
    ends = accumulate(batch.image_count for batch in described)
    counts = [
        max(0, min(end, held.stop) - max(end - batch.image_count, held.start)) for end, batch in zip(ends, described)
    ]
    return tuple(
        dataclasses.replace(batch, images=own, **part)
        for batch, own, part in zip(described, images.split(counts), parts, strict=True)
    )


def _share_indices(batches: Sequence[Batch], described: Sequence[Batch]) -> list[dict[str, Any]]:
    """The integer tensors of each micro-batch, sent to every rank as one message of int32."""
    message = None
    if batches:
        message = _locked(torch.cat([getattr(batch, name) for batch in batches for name in INDICES]).int())
    sizes = [len(getattr(batch, name)) for batch in described for name in INDICES]
    pieces = iter(broadcast.share_tensor(message, shape=(sum(sizes),), dtype=torch.int32).long().split(sizes))
    return [{name: next(pieces) for name in INDICES} for _ in described]


def _lock_images(batch: Batch) -> Batch:
    return dataclasses.replace(batch, images=_locked(batch.images))


def _locked(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in page-locked memory, from which a copy to CUDA does not hold up the host."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
