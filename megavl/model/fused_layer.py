"""A decoder layer on one tensor-parallel rank: two autograd functions around the attention.

Between matrix products stands one kernel each. Backward, products add to the fp32 gradients themselves. Norms and
SwiGLU are computed again from what the layer keeps: of a token 6 H + 2 F numbers and two scales.

Legend: T tokens, H hidden, A heads, D channels per head, F inner width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megavl.model import kernels
from megavl.model.attention import Segments
from megavl.model.weight_gradients import weight_gradient


class FusedLayer(TransformerLayer):
    """megatron-core's layer with the same weights, computed as few kernels."""

    def forward(
        self, hidden_states: torch.Tensor, *_: Any, packed_seq_params: Segments, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """(T, 1, H) to (T, 1, H); the second result is megatron-core's for cross-attention."""
        assert isinstance(packed_seq_params, Segments), "a cache is read by layers that are built to generate"
        attention, packed = self.self_attention, packed_seq_params
        query, key, value, residual = _BeforeAttention.apply(
            hidden_states,
            _weight(self.input_layernorm),
            _weight(attention.linear_qkv),
            packed.cos,
            packed.sin,
            self.input_layernorm.eps,
            self.config.gradient_accumulation_fusion,
        )
        attend = partial(attention.core_attention.attend, packed=packed)
        if attention.checkpoint_core_attention and self.training:
            attended = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            attended = attend(query, key, value)
        out = _AfterAttention.apply(
            attended.flatten(1),
            residual,
            _weight(attention.linear_proj),
            _weight(self.pre_mlp_layernorm),
            _weight(self.mlp.linear_fc1),
            _weight(self.mlp.linear_fc2),
            self.pre_mlp_layernorm.eps,
            self.recompute_mlp,
            self.config.gradient_accumulation_fusion,
        )
        return out, None


def _weight(module: nn.Module) -> torch.Tensor:
    """A module's weight, after its hooks: those of megatron-core wait until all ranks have sent their share of it."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight


class _BeforeAttention(torch.autograd.Function):
    """Norm, query, key and value, rotary embedding. The residual passes through, so that its gradient is added here."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: torch.Tensor,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        fused: bool,
    ) -> tuple[torch.Tensor, ...]:
        rows = x.view(-1, x.shape[-1])
        normed, scale = kernels.normalized(rows, norm, eps)
        heads = torch.mm(normed, qkv.t()).view(len(rows), -1, 6 * cos.shape[-1])
        query, key, value = kernels.split_rotated(heads, cos, sin)
        ctx.save_for_backward(rows, scale, norm, qkv, cos, sin)
        ctx.qkv, ctx.fused = qkv, fused
        return query, key, value, x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, scale, norm, qkv, cos, sin = ctx.saved_tensors
        *of_heads, residual = grads
        joined, normed = kernels.split_rotated_back(*of_heads, cos, sin, rows, scale, norm)
        joined = joined.view(len(rows), -1)
        of_qkv = weight_gradient(ctx.qkv, joined, normed, fused=ctx.fused) if ctx.needs_input_grad[2] else None
        of_normed = torch.mm(joined, qkv)
        of_x, of_norm = kernels.normalized_back(of_normed, rows, scale, norm, residual.view(rows.shape))
        return of_x.view(residual.shape), of_norm, of_qkv, None, None, None, None


class _AfterAttention(torch.autograd.Function):
    """Projection, residual, norm, SwiGLU and residual."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: torch.Tensor,
        x: torch.Tensor,
        proj: torch.Tensor,
        norm: torch.Tensor,
        fc1: torch.Tensor,
        fc2: torch.Tensor,
        eps: float,
        recompute: bool,
        fused: bool,
    ) -> torch.Tensor:
        rows = x.view(-1, x.shape[-1])
        rows, normed, scale = kernels.added_normalized(rows, torch.mm(attended, proj.t()), norm, eps)
        both = torch.mm(normed, fc1.t())
        # Not a view, since a pipeline releases the storage of what it has sent.
        out = torch.empty_like(x)
        torch.addmm(rows, kernels.swiglu(both), fc2.t(), out=out.view(rows.shape))
        ctx.save_for_backward(attended, rows, scale, proj, norm, fc1, fc2, None if recompute else both)
        ctx.weights, ctx.fused = (proj, fc1, fc2), fused
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attended, rows, scale, proj, norm, fc1, fc2, both = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape)
        if both is None:
            both = torch.mm(kernels.again(rows, scale, norm), fc1.t())
        of_both, active, normed = kernels.mlp_back(both, torch.mm(grad, fc2), rows, scale, norm)
        del both
        wanted = ctx.needs_input_grad
        add = partial(weight_gradient, fused=ctx.fused)
        of_fc2 = add(ctx.weights[2], grad, active) if wanted[5] else None
        of_fc1 = add(ctx.weights[1], of_both, normed) if wanted[4] else None
        of_rows, of_norm = kernels.normalized_back(torch.mm(of_both, fc1), rows, scale, norm, grad)
        of_proj = add(ctx.weights[0], of_rows, attended) if wanted[2] else None
        of_attended = torch.mm(of_rows, proj)
        return of_attended, of_rows.view(grads[0].shape), of_proj, of_norm, of_fc1, of_fc2, None, None, None
