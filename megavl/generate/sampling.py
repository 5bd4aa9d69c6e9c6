"""From logits to a token: greedy, or drawn from the most likely tokens.

Legend: V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megavl.config.errors import NumericsError, UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; above it, logits are divided by it and a token is drawn."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum; 1 keeps all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature: {self.temperature} is not usable; give 0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"--top-p: {self.top_p} is not a share of probability; give a number above 0, at most 1")
        if self.top_p < 1.0 and self.temperature == 0.0:
            raise UsageError(f"--top-p: {self.top_p} has no effect on greedy decoding; give --temperature too")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed: {self.seed} is out of range; give a number from 0 to 2^63 - 1")

    def generator(self) -> torch.Generator:
        """A generator at the seed."""
        return torch.Generator().manual_seed(self.seed)


def choose(logits: torch.Tensor, *, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token.

    Args:
        logits: (V,).
        sampling: rule.
        generator: of the host, so that a seed gives the same draws on every device.

    Raises:
        NumericsError: a logit is not finite.
    """
    scores = logits.detach().float().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise NumericsError("the model's logits are not finite; its weights are damaged, or it needs --dtype float32")
    if sampling.temperature == 0.0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores.double() / sampling.temperature, dim=-1)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    # A token stays while those before it have not reached the share; the first one always does.
    ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0.0
    return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
