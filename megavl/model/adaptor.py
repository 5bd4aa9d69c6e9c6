"""Projections of vision features to the language model's width (`aligner` in the released code, `projector.py`).

Legend: I images, P patches, W width of both towers, H language width.
"""

from __future__ import annotations

import torch
from torch import nn

from megavl.config.model import ModelConfig


def build_adaptor(config: ModelConfig) -> nn.Module:
    """The row of the adaptor table that `config.adaptor` names; `forward(low, high)` gives (I, P, H)."""
    rows = {"linear": _Linear, "mlp_gelu": _Mlp, "low_high_hybrid_split_mlp_gelu": _HybridSplitMlp}
    return rows[config.adaptor.kind](config.siglip.width, config.llm.hidden_size, depth=config.adaptor.depth)


def _gelu_then_linear(hidden: int, *, times: int) -> list[nn.Module]:
    return [module for _ in range(times) for module in (nn.GELU(), nn.Linear(hidden, hidden))]


class _Linear(nn.Module):
    def __init__(self, width: int, hidden: int, *, depth: int) -> None:
        super().__init__()
        self.layers = nn.Linear(width, hidden)

    def forward(self, low: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = self.layers(low)
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, *, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), *_gelu_then_linear(hidden, times=depth - 1))

    def forward(self, low: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = self.layers(low)
        return out


class _HybridSplitMlp(nn.Module):
    """One Linear to H/2 per tower, channels joined HIGH first, then (GELU, Linear) x (depth - 1)."""

    def __init__(self, width: int, hidden: int, *, depth: int) -> None:
        super().__init__()
        self.high_up_proj = nn.Linear(width, hidden // 2)
        self.low_up_proj = nn.Linear(width, hidden // 2)
        self.layers = nn.Sequential(*_gelu_then_linear(hidden, times=depth - 1))

    def forward(self, low: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
        assert high is not None, "the hybrid adaptor needs SAM features"
        out: torch.Tensor = self.layers(torch.cat([self.high_up_proj(high), self.low_up_proj(low)], dim=-1))
        return out
