"""The training loss: next-token negative log-likelihood over the positions that count.

Legend: R positions of a micro-batch whose label counts, V vocabulary of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megavl.data.batch import Batch
from megavl.model import kernels


def vocab_parallel_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, group: dist.ProcessGroup, compiled: bool = False
) -> torch.Tensor:
    """Loss of each position, at least fp32, (R,), nats.

    It computes the sum of megatron-core's `vocab_parallel_cross_entropy` without an fp32 copy of all logits. For 4096
    positions of the 102,400-way head that copy is 1.6 GiB kept for the backward pass, and as much again on the way.
    One kernel reads the logits, or rows go through fp32 a few at a time. Backward, the gradient overwrites the logits.

    Args:
        logits: (R, V) in the dtype of the weights, V split over the ranks of `group` in their order.
        labels: int64 (R,).
        compiled: whether torch.compile makes the kernels.
    """
    out: torch.Tensor = _VocabParallelLoss.apply(logits, labels, group, compiled)
    return out


@torch.no_grad()
def vocab_parallel_scores(logits: torch.Tensor, labels: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    """Loss of each position, and whether its label is the likeliest token, (2, R), at least fp32.

    Args:
        logits: (R, V), V split over the ranks of `group` in their order.
        labels: int64 (R,).

    Returns:
        The loss in nats, and 1 where no logit exceeds the label's, else 0.
    """
    _, chosen, _, _ = _label_logits(logits, labels, group=group)
    if group.size() > 1:
        dist.all_reduce(chosen, group=group)
    loss = vocab_parallel_loss(logits, labels, group=group)
    return torch.stack([loss, (chosen == 0).to(loss.dtype)])


def _label_logits(
    logits: torch.Tensor, labels: torch.Tensor, *, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logit of each row, and the label's relative to it.

    Returns:
        The largest logits (R,), at least fp32, over all ranks. The label's logit minus the largest one (R,), zero where
        another rank holds the label. Its column on this rank (R,), and whether this rank holds it (R,).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.amax(dim=1).to(wide)
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    columns = labels - group.rank() * logits.shape[1]
    own = (columns >= 0) & (columns < logits.shape[1])
    columns = columns.where(own, 0)
    # Relative to the largest logit of the row, so that the loss of a nearly certain label keeps its digits.
    chosen = (logits.gather(1, columns[:, None])[:, 0].to(wide) - largest).where(own, 0.0)
    return largest, chosen, columns, own


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, compiled: bool
    ) -> torch.Tensor:
        largest, chosen, columns, own = _label_logits(logits, labels, group=group)
        total = kernels.exp_sums(logits, largest, compiled=compiled)
        if group.size() > 1:
            both = torch.stack([total, chosen])
            dist.all_reduce(both, group=group)
            total, chosen = both.unbind()
        loss = total.log() - chosen
        # Not saved through autograd, which would refuse logits that were overwritten.
        ctx.kept = (logits, largest + total.log(), loss.detach(), columns, own) if ctx.needs_input_grad[0] else None
        ctx.compiled = compiled
        return loss

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, shift, loss, columns, own = ctx.kept
        ctx.kept = None
        kernels.to_probabilities(logits, shift, scales[0], compiled=ctx.compiled)
        # Of a label p - 1, without rounding p to the dtype of the logits.
        rows = torch.arange(len(columns), device=logits.device)
        of_label = (torch.expm1(-loss) * scales[0]).to(logits.dtype)
        logits[rows, columns] = of_label.where(own, logits[rows, columns])
        return logits, None, None, None


def counted_loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What megatron-core's schedule wants from the last stage.

    Args:
        per_token: loss of each counted token (1, R), nats.

    Returns:
        Sum over the tokens, their number, and a report `{"loss": [sum, number]}`.
    """
    total = per_token.to(torch.promote_types(per_token.dtype, torch.float32)).sum()
    tokens = torch.full_like(total, per_token.numel())
    # megatron-core scales the loss in place later, so the report is a copy.
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach().clone(), tokens])}


@torch.no_grad()
def loss_by_source(per_token: torch.Tensor, *, batch: Batch, sources: int) -> torch.Tensor:
    """Sum of the loss and number of its tokens for each source, (sources, 2).

    Sums do not depend on the order in which threads add, unlike those of `index_add_` on CUDA.

    Args:
        per_token: loss of each counted token (1, R), nats.
        batch: the micro-batch, with the source of each sequence.
        sources: number of sources.
    """
    losses = per_token[0].to(torch.promote_types(per_token.dtype, torch.float32))
    found = losses.new_zeros(sources, 2)
    if len(set(batch.sources)) == 1:
        total = losses.sum()
        found[batch.sources[0]] = torch.stack([total, torch.full_like(total, len(losses))])
        return found
    members = batch.loss_rows // (len(batch.tokens) // len(batch.sources))
    for source in set(batch.sources):
        own = torch.zeros_like(members, dtype=torch.bool)
        for sequence, of_sequence in enumerate(batch.sources):
            if of_sequence == source:
                own |= members == sequence
        found[source] = torch.stack([losses.where(own, 0.0).sum(), own.sum()])
    return found
