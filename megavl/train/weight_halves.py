"""fp32 weights as the bf16 weights and the 16 bits that these lack, and updates of a few weights at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

UPDATED_AT_ONCE = 2**27
"""Weights whose moments Transformer Engine casts to fp32 together, which takes 8 bytes for each."""


def group_in_parts(group: dict[str, Any], *, most: int = UPDATED_AT_ONCE) -> Iterator[dict[str, Any]]:
    """Groups of the same settings with at most `most` numbers each, or with one larger weight."""
    part: list[torch.Tensor] = []
    for weight in group["params"]:
        if part and sum(other.numel() for other in part) + weight.numel() > most:
            yield {**group, "params": part}
            part = []
        part.append(weight)
    if part:
        yield {**group, "params": part}


def split_weight(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest bf16 weights of fp32 ones, and the 16 low bits, as Transformer Engine's kernel splits them.

    A weight halfway between two is rounded away from zero.

    Returns:
        bf16 and int16, of the same shape.
    """
    bits = master.contiguous().view(torch.int32)
    low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000
    high = (bits >> 16) + (low < 0).int()
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_weight(weight: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """fp32 weights of their two parts; the reverse of `split_weight`."""
    high = weight.contiguous().view(torch.int16).int() - (rest < 0).int()
    return ((high << 16) | (rest.int() & 0xFFFF)).view(torch.float32)
