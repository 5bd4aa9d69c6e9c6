"""The training loss: next-token negative log-likelihood over the positions that count.

Legend: R positions of a micro-batch whose label counts.
"""

from __future__ import annotations

import torch


def counted_loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What megatron-core's schedule wants from the last stage.

    Args:
        per_token: loss of each counted token (1, R), nats.

    Returns:
        Sum over the tokens, their number, and a report `{"loss": [sum, number]}`.
    """
    total = per_token.float().sum()
    tokens = torch.full_like(total, per_token.numel())
    # megatron-core scales the loss in place later, so the report is a copy.
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach().clone(), tokens])}
