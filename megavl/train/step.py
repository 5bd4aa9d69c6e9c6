"""One optimizer step through megatron-core's pipeline schedule.

Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megavl.data.batch import Batch
from megavl.model.loss import counted_loss, loss_by_source
from megavl.parallel import cpu_runtime
from megavl.train.model_chunks import ModelChunks
from megavl.train.optimizer import Optimizer, without_vision


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks know after a step."""

    loss: float
    """Mean negative log-likelihood over the loss tokens of the global batch, nats."""
    loss_tokens: int
    grad_norm: float | None
    """Global norm before clipping; None when the step was skipped."""
    images: int
    """Images of the global batch."""
    bad_samples: int
    """Samples of the global batch that failed to load and count for nothing."""
    skipped: bool
    """Loss or gradient was not finite; no weight changed."""
    asked_to_stop: bool
    """Some rank received a pre-emption signal."""
    loss_by_source: tuple[float | None, ...] = ()
    """The loss over the tokens of each source; None for a source without a loss token in this step."""


def forward_backward(
    model: ModelChunks, batches: Sequence[Batch], *, sources: int = 0, forward_only: bool = False
) -> torch.Tensor:
    """Run all micro-batches; gradients end up summed, divided by the global number of loss tokens.

    Args:
        batches: the replica's micro-batches, from `next_step`.
        sources: number of sources whose losses are told apart.

    Returns:
        (1 + sources, 2) on the device: this rank's sum of the loss and number of its tokens. The first row is over all
        tokens, the others are of each source. Zero except on the last stage.
    """
    model.gather_vision()
    if model.encoders is not None:
        with model.timed("encoders forward"):
            batches = model.encoders.encode(batches)
    iterators = [iter(batches) for _ in model.chunks]
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward, last=batches[-1], sources=sources),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model.chunks),
        num_microbatches=len(batches),
        seq_length=len(batches[0].tokens),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    sums = [report["loss"] for report in reports]
    return torch.stack(sums).sum(0) if sums else torch.zeros(1 + sources, 2, device=cpu_runtime.device())


def train_step(
    model: ModelChunks, optimizer: Optimizer, batches: Sequence[Batch], *, stop_flag: bool, sources: int = 0
) -> StepResult:
    """Forward, backward, reduce, clip, update; a step with a loss or gradient that is not finite changes nothing.

    The host waits for the device once, at the end.

    Args:
        sources: number of sources whose losses are told apart.
    """
    model.zero_grad()
    optimizer.zero_grad()
    losses = forward_backward(model, batches, sources=sources).flatten()
    # One replica of the last stage reports the loss and one rank of the first stage the images and
    # failed samples of each data rank.
    reports_loss = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0
    reports_images = mpu.is_pipeline_first_stage() and mpu.get_tensor_model_parallel_rank() == 0
    known = [
        sum(batch.image_count for batch in batches) if reports_images else 0,
        float(stop_flag),
        float(batches[0].modality == "multimodal"),
        sum(len(batch.bad_samples) for batch in batches) if reports_images else 0,
    ]
    totals = torch.cat(
        [
            losses.double() if reports_loss else torch.zeros_like(losses, dtype=torch.float64),
            torch.tensor(known, dtype=torch.float64).to(losses.device, non_blocking=True),
        ]
    )
    with model.timed("waiting"):
        if dist.get_world_size() > 1:
            dist.all_reduce(totals)
    with without_vision(optimizer, active=batches[0].modality == "text"), model.timed("optimizer"):
        norm, updated = optimizer.step(totals[0])
    found = torch.cat([totals, torch.stack([norm.double(), updated.double()])]).tolist()
    loss_sum, loss_tokens, *of_sources = found[: len(losses)]
    images, asked_to_stop, multimodal, bad_samples, grad_norm, changed = found[len(losses) :]
    assert multimodal in (0, dist.get_world_size()), f"{multimodal} ranks ran a multimodal step, the others a text one"
    return StepResult(
        loss=loss_sum / max(1.0, loss_tokens),
        loss_tokens=int(loss_tokens),
        grad_norm=grad_norm if changed else None,
        images=int(images),
        bad_samples=int(bad_samples),
        skipped=not changed,
        asked_to_stop=asked_to_stop > 0,
        loss_by_source=tuple(
            total / count if count else None for total, count in zip(of_sources[::2], of_sources[1::2])
        ),
    )


def _forward(
    data: Iterator[Batch], stage: DistributedDataParallel, *, last: Batch, sources: int
) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    # Gradient reduction starts in the backward pass of the last micro-batch, so every gradient must exist there.
    out = stage(batch, dummy_image=batch is last and stage.ddp_config.overlap_grad_reduce)
    return out, partial(_counted_loss, batch=batch, sources=sources)


def _counted_loss(
    per_token: torch.Tensor, *, batch: Batch, sources: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """`counted_loss` with a row for each source in its report: (1 + sources, 2)."""
    total, tokens, report = counted_loss(per_token)
    rows = [report["loss"][None]]
    if sources:
        rows.append(loss_by_source(per_token, batch=batch, sources=sources))
    return total, tokens, {"loss": torch.cat(rows)}
