"""From logits to a token: greedy, or drawn from the most likely tokens.

Filters and their order are transformers': repetition penalty, temperature, top-k, top-p (4.57.6,
`generation/logits_process.py` and `generation/utils.py:_get_logits_processor`).

Legend: R sequences, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from megavl.config.errors import NumericsError, UsageError

LEAST_PENALTY, MOST_PENALTY = 1e-6, 1e6
"""Beyond them a penalty can make a finite logit infinite."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; above it, logits are divided by it and a token is drawn."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens, and any that tie with the last; 0 keeps all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities add up to this; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens already in the prompt or the answer."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature: {self.temperature} is not usable; give 0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"--top-p: {self.top_p} is not a share of probability; give a number above 0, at most 1")
        if self.top_k < 0:
            raise UsageError(f"--top-k: {self.top_k} is no number of tokens; give a positive one, or 0 to keep all")
        for name, unused in (("--top-p", self.top_p == 1.0), ("--top-k", self.top_k == 0)):
            if self.temperature == 0.0 and not unused:
                raise UsageError(f"{name}: it has no effect on greedy decoding; give --temperature too")
        if not LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise UsageError(
                f"--repetition-penalty: {self.repetition_penalty} is not usable; give a number from "
                f"{LEAST_PENALTY:g} to {MOST_PENALTY:g}, 1 for none"
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed: {self.seed} is out of range; give a number from 0 to 2^63 - 1")

    def generator(self) -> torch.Generator:
        """A new random generator with the seed."""
        return torch.Generator().manual_seed(self.seed)


def likeliest(logits: torch.Tensor) -> list[int]:
    """The greedy tokens of (R, V) logits.

    Raises:
        NumericsError: a logit is not finite.
    """
    # A sum is finite only if every term is; both results come to the host together.
    totals, tokens = torch.stack([logits.sum(-1, dtype=torch.float64), logits.argmax(-1).double()]).tolist()
    _require_finite(sum(totals))
    return [int(token) for token in tokens]


def choose(
    logits: torch.Tensor, *, sampling: Sampling, generator: torch.Generator, present: Collection[int] = ()
) -> int:
    """The next token of one sequence.

    Args:
        logits: (V,).
        generator: of the host, so that a seed gives the same draws on every device.
        present: tokens of the prompt and the answer so far, read with a repetition penalty only.

    Raises:
        NumericsError: a logit is not finite.
    """
    scores = logits.detach().float()
    scores = penalised(scores, sampling=sampling, present=present)
    if sampling.temperature == 0.0:
        return likeliest(scores[None])[0]
    _require_finite(float(scores.sum()))
    probabilities, tokens = candidates(scores.cpu(), sampling=sampling)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def candidates(scores: torch.Tensor, *, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to draw from, with their probabilities.

    Args:
        scores: float32 (V,), on the host.
        sampling: rule, with a temperature.

    Returns:
        Float64 probabilities (n,) and their tokens (n,) after the filters. With top-p they are in falling order.
    """
    # The largest is 0, so that no temperature, however small, makes a score infinite that is not.
    scores, tokens = (scores - scores.max()).double() / sampling.temperature, None
    if 0 < sampling.top_k < len(scores):
        least = scores.topk(sampling.top_k).values[-1]
        tokens = (scores >= least).nonzero().flatten()
        scores = scores[tokens]
    probabilities = torch.softmax(scores, dim=-1)
    if sampling.top_p < 1.0:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        # A token stays while those before it have not reached the share; the first one always does.
        kept = int((probabilities.cumsum(0) - probabilities < sampling.top_p).sum())
        probabilities, order = probabilities[:kept], order[:kept]
        tokens = order if tokens is None else tokens[order]
    return probabilities, torch.arange(len(scores)) if tokens is None else tokens


def penalised(scores: torch.Tensor, *, sampling: Sampling, present: Collection[int]) -> torch.Tensor:
    """Scores (V,) with the repetition penalty applied to the tokens that are already present."""
    if sampling.repetition_penalty == 1.0:
        return scores
    tokens = torch.tensor(sorted(set(present)), dtype=torch.int64, device=scores.device)
    held = scores[tokens]
    penalty = sampling.repetition_penalty
    return scores.index_copy(0, tokens, torch.where(held > 0, held / penalty, held * penalty))


def _require_finite(total: float) -> None:
    if not math.isfinite(total):
        raise NumericsError("the model's logits are not finite; its weights are damaged, or it needs --dtype float32")
