"""Learning rate as a pure function of the step (paper, Table 5; multi-step rule of arXiv 2401.02954)."""

from __future__ import annotations

import math

from megavl.config.recipe import OptimizerConfig


def learning_rate(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """Rate of one optimizer step.

    Args:
        step: 1 for the first step.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    rate = config.lr
    if config.schedule == "multistep":
        for milestone, factor in zip(config.milestones, config.factors):
            if step > milestone * steps:
                rate = config.lr * factor
    return rate
