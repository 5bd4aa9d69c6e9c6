"""How likely the model finds tokens, before a temperature, filters or a penalty change its logits.

Legend: R tokens, V vocabulary rows, K alternatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megavl.config.errors import NumericsError


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What the model thinks of one token."""

    log_prob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log-probabilities, falling; the token itself may be among them."""

    def truncated(self, count: int) -> Likelihood:
        """The same with the `count` likeliest tokens."""
        return Likelihood(log_prob=self.log_prob, top=self.top[:count])


def likelihood_table(logits: torch.Tensor, tokens: torch.Tensor, *, top: int) -> torch.Tensor:
    """Log-probability, likeliest tokens and their log-probabilities, as ranks exchange them.

    Args:
        logits: (R, V).
        tokens: int64 (R,).
        top: K.

    Returns:
        Float64 (R, 1 + 2 K) on the host.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    own = log_probs.gather(1, tokens[:, None])
    best = log_probs.topk(top, dim=-1)
    return torch.cat([own.double(), best.indices.double(), best.values.double()], dim=1).cpu()


def empty_table(top: int) -> torch.Tensor:
    """The table (0, 1 + 2 K) of no token."""
    return torch.zeros(0, 1 + 2 * top, dtype=torch.float64)


def read_table(table: torch.Tensor) -> tuple[Likelihood, ...]:
    """The rows of a `likelihood_table`.

    Raises:
        NumericsError: a value is not finite.
    """
    top = (table.shape[1] - 1) // 2
    found = []
    for log_prob, *rest in table.tolist():
        if not all(map(math.isfinite, (log_prob, *rest))):
            raise NumericsError("the model's log-probabilities are not finite; its weights are damaged")
        pairs = zip(map(int, rest[:top]), rest[top:], strict=True)
        found.append(Likelihood(log_prob=log_prob, top=tuple(pairs)))
    return tuple(found)
