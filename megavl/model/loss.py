"""The training loss: next-token negative log-likelihood over the positions that count.

Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

import torch


def masked_loss(
    mask: torch.Tensor, per_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What megatron-core's schedule wants from the last stage.

    Args:
        mask: float32 (T,), 1 where the label counts.
        per_token: loss per token (1, T), nats.

    Returns:
        Sum over the counted tokens, their number, and a report `{"loss": [sum, number]}`.
    """
    total = (per_token.view(-1).float() * mask).sum()
    tokens = mask.sum()
    # megatron-core scales the loss in place later, so the report is a copy.
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach().clone(), tokens])}
