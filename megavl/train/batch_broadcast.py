"""A step's micro-batches on every rank that needs them.

Legend: M micro-batches, T tokens of a micro-batch, R of these whose label counts, I images of the step, C canvas side
in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from megavl.config.errors import DataError
from megavl.data.batch import Batch, Modality
from megavl.model.attention import Segments, segments
from megavl.model.decoder import use_transformer_engine
from megavl.model.vision import Features
from megavl.parallel import broadcast, cpu_runtime


class StepSource(Protocol):
    """What the loading rank asks for data."""

    def get(self, step: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of a step."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward pass, on the device."""

    tokens: torch.Tensor
    """int64 (1, T)."""
    labels: torch.Tensor
    """int64 (1, R)."""
    loss_rows: torch.Tensor
    """int64 (R,): positions of these labels, ascending."""
    packed: Segments
    images: torch.Tensor | Features
    """uint8 (I, 3, C, C), empty on inner and last stages; under `split_all` features of the towers, filled in when all
    ranks have encoded their shares."""
    anchor: bool
    """Last micro-batch of the step: gradient reduction starts there, so every gradient must exist."""


@dataclass(frozen=True, kw_only=True)
class StepData:
    """A step as this rank sees it."""

    modality: Modality
    micro_batches: tuple[MicroBatch, ...]
    images: int
    """Images of this data-parallel rank's share, all micro-batches."""
    image_counts: tuple[int, ...]
    """Images of each micro-batch."""
    own_images: torch.Tensor | None
    """Under `split_all`, the share of these that this rank encodes: uint8 (I, 3, C, C)."""
    sample_ids: tuple[int, ...]
    bad_samples: tuple[str, ...]


@dataclass(frozen=True)
class _Header:
    modality: Modality
    borders: tuple[tuple[int, ...], ...]
    image_counts: tuple[int, ...]
    canvas: int
    loss_tokens: tuple[int, ...]
    sample_ids: tuple[int, ...]
    bad_samples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class HostStep:
    """A step's micro-batches on the host, ready to be copied: page-locked where CUDA is."""

    header: _Header
    words: torch.Tensor
    """int64 (M, 2, T): tokens and labels."""
    masks: torch.Tensor
    """fp32 (M, T)."""
    images: tuple[torch.Tensor, ...]
    """uint8 (I, 3, C, C) of each micro-batch: torch rounds the size of locked memory up to a power of two."""


class StepPrefetcher:
    """Puts the next step together in a thread while the device computes this one.

    A replica's images of two steps are on the host then. On a CPU the thread would take its time from the cores that
    train.
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
        self._coming: dict[int, Future[HostStep]] = {}

    def get(self, step: int) -> HostStep:
        """The step, and the following one on its way. Raises what the source raised for it."""
        coming = self._coming.pop(step, None) or self._start(step)
        found = coming.result()
        if step + 1 < self._steps:
            self._coming[step + 1] = self._start(step + 1)
        return found

    def close(self) -> None:
        """Wait until the source is left alone."""
        self._thread.shutdown(cancel_futures=True)

    def _start(self, step: int) -> Future[HostStep]:
        return self._thread.submit(lambda: _put_together(self._source.get(step)))


def _use(device: torch.device) -> None:
    """Let this thread lock its pages through the rank's own GPU, not the first."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def next_step(source: StepSource | StepPrefetcher | None, step: int, *, split_all: bool = False) -> StepData:
    """Load a step on the source rank and share it.

    Args:
        source: on the rank for which `broadcast.is_source()` holds; None elsewhere.
        step: 0 for the first.
        split_all: give every rank its share of the step's images, instead of all to the first stage.

    Raises:
        DataError: loading failed; the same on every rank of the model-parallel group.
    """
    host: HostStep | None = None
    header: _Header | str | None = None
    if source is not None:
        try:
            host = source.get(step) if isinstance(source, StepPrefetcher) else _put_together(source.get(step))
            header = host.header
        except DataError as error:
            header = str(error)
    header = broadcast.share_object(header)
    if isinstance(header, str):
        raise DataError(header)
    assert header is not None, "the source describes the step"
    count, length = len(header.borders), header.borders[0][-1]
    words, masks, images = ((host.words,), (host.masks,), host.images) if host is not None else ((), (), ())
    tokens_and_labels = broadcast.share_tensor(words, shape=(count, 2, length), dtype=torch.int64)
    loss_masks = broadcast.share_tensor(masks, shape=(count, length), dtype=torch.float32)
    shape = (sum(header.image_counts), 3, header.canvas, header.canvas)
    own = None
    if split_all:
        own = broadcast.scatter_images(images, shape=shape, dtype=torch.uint8)
        canvases = own[:0]
    else:
        canvases = broadcast.share_with_first_stage(images, shape=shape, dtype=torch.uint8)
    counts = header.image_counts if canvases.shape[0] else (0,) * count
    pieces = canvases.split(list(counts)) if canvases.shape[0] else (canvases,) * count
    return StepData(
        modality=header.modality,
        micro_batches=tuple(
            _micro_batch(tokens_and_labels[i], loss_masks[i], pieces[i], header, number=i) for i in range(count)
        ),
        images=sum(header.image_counts),
        image_counts=header.image_counts,
        own_images=own,
        sample_ids=header.sample_ids,
        bad_samples=header.bad_samples,
    )


def _put_together(batches: Sequence[Batch]) -> HostStep:
    return HostStep(
        header=_describe(batches),
        words=_locked(torch.stack([torch.stack([batch.tokens, batch.labels]) for batch in batches])),
        masks=_locked(torch.stack([batch.loss_mask for batch in batches])),
        images=tuple(_locked(batch.images) for batch in batches),
    )


def _locked(tensor: torch.Tensor) -> torch.Tensor:
    """Where a copy to CUDA needs no host."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _describe(batches: Sequence[Batch]) -> _Header:
    return _Header(
        modality=batches[0].modality,
        borders=tuple(tuple(batch.cu_seqlens.tolist()) for batch in batches),
        image_counts=tuple(batch.images.shape[0] for batch in batches),
        canvas=batches[0].images.shape[-1],
        loss_tokens=tuple(int(batch.loss_mask.count_nonzero()) for batch in batches),
        sample_ids=tuple(i for batch in batches for i in batch.sample_ids),
        bad_samples=tuple(text for batch in batches for text in batch.bad_samples),
    )


def _micro_batch(
    words: torch.Tensor, mask: torch.Tensor, images: torch.Tensor, header: _Header, *, number: int
) -> MicroBatch:
    cu_seqlens = torch.tensor(header.borders[number], dtype=torch.int32)
    # The number of rows came from the host: counting them on the device would wait for it.
    rows = mask.argsort(descending=True, stable=True)[: header.loss_tokens[number]]
    return MicroBatch(
        tokens=words[0:1],
        labels=words[1:2, rows],
        loss_rows=rows,
        packed=segments(cu_seqlens, device=cpu_runtime.device(), on_device=use_transformer_engine()),
        images=images,
        anchor=number == len(header.borders) - 1,
    )
