"""Projections of vision features to the language model's width (`aligner` in the released code, `projector.py`).

`megavl.config.adaptor` has the table of kinds, their sources and the readings of the paper. Parameter names are the
released checkpoint's where the release has the kind. Forward takes the features of SigLIP (low) and SAM (high).

Legend: I images, P patches, G patches along one side, W width of both towers, H language width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from megavl.config.adaptor import AdaptorKind
from megavl.config.model import ModelConfig


def build_adaptor(config: ModelConfig) -> nn.Module:
    """The row of the adaptor table that `config.adaptor` names; `forward(low, high)` gives (I, P, H)."""
    width, hidden, depth = config.siglip.width, config.llm.hidden_size, config.adaptor.depth
    rows: dict[AdaptorKind, Callable[[], nn.Module]] = {
        "linear": lambda: _Whole(nn.Linear(width, hidden)),
        "mlp_gelu": lambda: _Whole(_mlp(width, hidden, depth=depth)),
        "low_high_hybrid_split_mlp_gelu": lambda: _SplitFirst(
            width, hidden // 2, hidden, depth=depth, arrange=nn.Identity(), join=_join_channels
        ),
        "shared_linear": lambda: _Whole(nn.Linear(2 * width, hidden), both=True),
        "shared_mlp": lambda: _Whole(_mlp(2 * width, hidden, depth=depth), both=True),
        "separate_mlp": lambda: _SeparateTowers(width, hidden // 2, depth=depth),
        "token_pooling_width": lambda: _SplitFirst(
            2 * width, hidden, hidden, depth=depth, arrange=_pair_columns, join=_join_sequence
        ),
        "token_pooling_height": lambda: _SplitFirst(
            2 * width, hidden, hidden, depth=depth, arrange=_pair_rows, join=_join_sequence
        ),
    }
    return rows[config.adaptor.kind]()


def _mlp(inputs: int, outputs: int, *, depth: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), *_gelu_then_linear(outputs, times=depth - 1))


def _gelu_then_linear(width: int, *, times: int) -> list[nn.Module]:
    return [module for _ in range(times) for module in (nn.GELU(), nn.Linear(width, width))]


def _pair_columns(features: torch.Tensor) -> torch.Tensor:
    """(I, P, W) to (I, P / 2, 2W): two patches beside each other, the left one first."""
    images, patches, width = features.shape
    return features.reshape(images, patches // 2, 2 * width)


def _pair_rows(features: torch.Tensor) -> torch.Tensor:
    """(I, P, W) to (I, P / 2, 2W): two patches above each other, the upper one first."""
    images, patches, width = features.shape
    grid = math.isqrt(patches)
    rows = features.reshape(images, grid // 2, 2, grid, width)
    return rows.transpose(2, 3).reshape(images, patches // 2, 2 * width)


def _join_channels(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return torch.cat([high, low], dim=-1)


def _join_sequence(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return torch.cat([high, low], dim=1)


class _Whole(nn.Module):
    """Layers over SigLIP's features, or over the channels of both towers, HIGH first."""

    def __init__(self, layers: nn.Module, *, both: bool = False) -> None:
        super().__init__()
        self.layers, self.both = layers, both

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(_join_channels(high, low) if self.both else low)
        return out


class _SplitFirst(nn.Module):
    """Features arranged, one Linear for each tower, joined HIGH first, then (GELU, Linear) x (depth - 1)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        joined: int,
        *,
        depth: int,
        arrange: Callable[[torch.Tensor], torch.Tensor],
        join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.arrange, self.join = arrange, join
        self.high_up_proj = nn.Linear(inputs, outputs)
        self.low_up_proj = nn.Linear(inputs, outputs)
        self.layers = nn.Sequential(*_gelu_then_linear(joined, times=depth - 1))

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        joined = self.join(self.high_up_proj(self.arrange(high)), self.low_up_proj(self.arrange(low)))
        out: torch.Tensor = self.layers(joined)
        return out


class _SeparateTowers(nn.Module):
    """Layers for each tower on half of the width, channels joined HIGH first at the end."""

    def __init__(self, inputs: int, outputs: int, *, depth: int) -> None:
        super().__init__()
        self.high_layers = _mlp(inputs, outputs, depth=depth)
        self.low_layers = _mlp(inputs, outputs, depth=depth)

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return _join_channels(self.high_layers(high), self.low_layers(low))
