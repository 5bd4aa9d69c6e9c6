"""Modules of the stand-in for Transformer Engine.

Legend: T tokens of the micro-batch, A attention heads of this rank, D channels per head, H inputs and F outputs of a
projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

EMPTY = torch.uint8
"""Type of the empty tensor that a module without FP8 has as extra state."""


class WithExtraState(nn.Module):
    """A module whose state holds a tensor, which is empty without FP8."""

    def get_extra_state(self) -> torch.Tensor:
        """Empty, as without FP8."""
        return torch.empty(0, dtype=EMPTY)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Transformer Engine unpickles bytes that it finds here."""
        assert state is None or state.numel() == 0, "Transformer Engine would unpickle this"


def _group_size(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    out = x.new_empty(x.shape[0] * _group_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce_scatter(x: torch.Tensor, group: Any) -> torch.Tensor:
    out = x.new_empty(x.shape[0] // _group_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _all_reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    out = x.clone()
    dist.all_reduce(out, group=group)
    return out


def _same(x: torch.Tensor, group: Any) -> torch.Tensor:
    return x


class _Exchange(torch.autograd.Function):
    """One collective forward and another one backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Callable, backward: Callable, group: Any) -> torch.Tensor:
        ctx.backward_call, ctx.group = backward, group
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return ctx.backward_call(gradients[0], ctx.group), None, None, None


class _Product(torch.autograd.Function):
    """x (..., H) by weight (F, H), whose gradient may be added to `weight.main_grad`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, fuse: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fuse = fuse
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = gradients[0]
        rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
        if not ctx.fuse:
            return grad @ weight, rows.t() @ columns, None
        weight.main_grad.add_(rows.float().t() @ columns.float())
        weight.grad_added_to_main_grad = True
        return grad @ weight, get_dummy_wgrad([*weight.shape], weight.dtype), None


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """What autograd gets in place of a gradient that is in `main_grad` already."""
    return torch.zeros(shape, dtype=dtype, device="cuda")


class RMSNorm(WithExtraState):
    """x / rms(x) * weight."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size or normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of x (..., H)."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(WithExtraState):
    """A projection, split over its outputs (`column`) or its inputs (`row`)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
    ) -> None:
        super().__init__()
        assert not bias and not return_bias and not delay_wgrad_compute and parallel_mode in ("column", "row")
        assert tp_group is None or dist.get_world_size(tp_group) == tp_size, "tp_size is that of tp_group"
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        if parallel_mode == "column":
            self.out_features //= tp_size
        else:
            self.in_features //= tp_size
        weight = torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        if init_method is not None:
            init_method(weight)
        axis = 0 if parallel_mode == "column" else 1
        for name, value in (("tensor_model_parallel", True), ("partition_dim", axis), ("partition_stride", 1)):
            setattr(self.weight, name, value)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """x (T, 1, H) to (T, 1, F); T is split over the group under sequence parallelism."""
        assert x.dtype == self.weight.dtype, "Transformer Engine casts to the type of autocast, which is not on"
        if self.parallel_mode == "column":
            calls = (_gather, _reduce_scatter) if self.sequence_parallel else (_same, _all_reduce)
            x = _Exchange.apply(x, *calls, self.tp_group) if self.tp_size > 1 else x
        out = _Product.apply(x, self.weight, self.fuse_wgrad_accumulation and torch.is_grad_enabled())
        if self.parallel_mode == "row" and self.tp_size > 1:
            calls = (_reduce_scatter, _gather) if self.sequence_parallel else (_all_reduce, _same)
            out = _Exchange.apply(out, *calls, self.tp_group)
        return out


class LayerNormLinear(Linear):
    """A norm and the column projection of its output."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(in_features, out_features, **rest)
        assert normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        self.eps = eps
        norm = torch.ones(in_features, dtype=self.weight.dtype, device=self.weight.device)
        self.layer_norm_weight = nn.Parameter(norm)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """As `Linear`, of the normalised x."""
        norm = self.layer_norm_weight
        return super().forward(F.rms_norm(x, norm.shape, norm, self.eps), is_first_microbatch)


def _allow_missing_state(module: nn.Module, keys: Any) -> None:
    """Checkpoints do not hold the extra state of attention."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith("core_attention._extra_state")]


class DotProductAttention(WithExtraState):
    """Causal attention inside the segments of packed rows."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and attention_type == "self" and attn_mask_type == "causal"
        assert num_gqa_groups in (None, num_attention_heads)
        self.heads, self.channels = num_attention_heads // tp_size, kv_channels
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.register_load_state_dict_post_hook(_allow_missing_state)

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        """query, key and value (T, A, D) to (T, A * D)."""
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and attention_mask is None
        assert cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None, "no segment has padding inside"
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        for tensor in (query_layer, key_layer, value_layer):
            assert tensor.dtype in (torch.float16, torch.bfloat16), f"cuDNN's attention does not support {tensor.dtype}"
            assert tensor.shape[1:] == (self.heads, self.channels) and tensor.is_cuda and tensor.stride(-1) == 1
        for borders in (cu_seqlens_q, cu_seqlens_kv):
            assert borders.dtype == torch.int32 and borders.is_cuda, "borders are int32 on the device"
        borders = cu_seqlens_q.tolist()
        longest = max(end - start for start, end in zip(borders, borders[1:]))
        assert borders[-1] == len(query_layer) and max_seqlen_q == max_seqlen_kv >= longest  # type: ignore[operator]
        pieces = []
        for start, end in zip(borders, borders[1:]):
            q, k, v = (x[start:end].float().transpose(0, 1)[None] for x in (query_layer, key_layer, value_layer))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces).flatten(1).to(query_layer.dtype)


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: torch.Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """Rotary embedding of t (T, A, D) by fp32 angles (L, 1, 1, D), anew in each segment."""
    assert tensor_format == "thd" and fused and not interleaved and cp_size == 1 and cu_seqlens is not None
    assert freqs.dtype == torch.float32 and cu_seqlens.dtype == torch.int32 and cu_seqlens.is_cuda
    borders = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(borders, borders[1:])]
    assert max(lengths) <= len(freqs), "angles for the longest segment"
    angles = torch.cat([freqs[:length, 0] for length in lengths])
    low, high = t.float().chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (t.float() * angles.cos() + turned * angles.sin()).to(t.dtype)


class SplitAlongDim(torch.autograd.Function):
    """Views of a tensor's parts; the gradient is one tensor again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: int, sizes: Any, squeeze: bool = False) -> tuple[torch.Tensor, ...]:
        ctx.axis = axis
        return torch.split(x, sizes, dim=axis)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return torch.cat(gradients, dim=ctx.axis), None, None, None
