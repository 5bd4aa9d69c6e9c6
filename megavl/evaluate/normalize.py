"""What the options of a question are compared by."""

from __future__ import annotations

from megavl.config.evaluation import Normalization
from megavl.generate.score import Score


def cost(score: Score, option: str, *, normalize: Normalization) -> float:
    """What options are compared by, lowest best: perplexity, or nats in all or for each UTF-8 byte of the option."""
    if normalize == "token":
        return score.perplexity
    return -score.log_prob / (len(option.encode()) if normalize == "byte" else 1)
