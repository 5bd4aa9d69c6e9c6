"""RMSNorm, SwiGLU and rotary embedding with the kernels of `kernels.py`, as parts of megatron-core's layers.

They hold no collective, so they serve tensor and sequence parallelism too.

Legend: T tokens, H hidden, A heads of this rank, D channels per head, F inner width of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from megavl.model import kernels
from megavl.model.norm import RMSNorm


class FusedNorm(RMSNorm):
    """RMSNorm as one kernel forward and one backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of x (..., H)."""
        out: torch.Tensor = _Norm.apply(x, self.weight, self.eps)
        return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, scale = kernels.normalized(rows, weight, eps)
        ctx.save_for_backward(rows, scale, weight)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, scale, weight = ctx.saved_tensors
        of_rows, of_weight = kernels.normalized_back(grads[0].reshape(rows.shape), rows, scale, weight, None)
        return of_rows.view(grads[0].shape), of_weight, None


class FusedMLP(MLP):
    """megatron-core's MLP with SwiGLU as one kernel forward and one backward."""

    def forward(self, hidden_states: torch.Tensor, per_token_scale: None = None, **_: Any) -> tuple[torch.Tensor, None]:
        """(T, 1, H) to (T, 1, H); the second result is megatron-core's for a bias."""
        assert per_token_scale is None, "it belongs to mixtures of experts"
        both, _bias = self.linear_fc1(hidden_states)
        out, _bias = self.linear_fc2(_SwiGLU.apply(both))
        return out, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        rows = both.reshape(-1, both.shape[-1])
        out: torch.Tensor = kernels.swiglu(rows)
        return out.view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        rows, grad = both.reshape(-1, both.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        out: torch.Tensor = kernels.swiglu_back(rows, grad)[0]
        return out.view(both.shape)
