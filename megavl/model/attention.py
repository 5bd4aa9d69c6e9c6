"""Core attention without Transformer Engine: over packed sequences, and over a key-value cache for generation.

Legend: T tokens of the micro-batch, A attention heads of this rank, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional as F

from megavl.data.batch import Batch
from megavl.model import kernels
from megavl.model.cache import Step

Rotation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x (T, A, D) by cos and sin (T, 1, D / 2)."""


@dataclass
class Segments(PackedSeqParams):
    """Segment borders of a batch in the form that megatron-core's modules pass on, and the rotary angles."""

    borders: tuple[int, ...] = ()
    trees: tuple[tuple[int, int, torch.Tensor | None], ...] = ()
    """First row and end of each segment together with those that continue it, and which of its rows each row of it
    attends to, bool (L, L); None: all up to itself."""
    device_cu_seqlens: torch.Tensor | None = None
    key_rows: torch.Tensor | None = None
    """int64 (K,): rows whose keys each segment reads, its parent's and its own; None where all read their own."""
    device_cu_seqlens_keys: torch.Tensor | None = None
    """int32: first of each segment's `key_rows`, and K; None where all read their own."""
    positions: torch.Tensor | None = None
    """int64 (T,), of each token in its segment."""
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    """(T, 1, D / 2) of the rotary angles; the two halves of the channels turn by the same ones."""

    def set_angles(self, angles: torch.Tensor, *, dtype: torch.dtype) -> None:
        """Look up each token's rotary angles.

        Args:
            angles: fp32 (L, 1, 1, D) of the first L positions, as megatron-core makes them.
            dtype: of query and key.
        """
        assert self.positions is not None, "segments() sets them"
        half = angles[:, 0, :, : angles.shape[-1] // 2]
        self.cos, self.sin = (table.to(dtype)[self.positions] for table in (half.cos(), half.sin()))


def segments(batch: Batch, *, on_device: bool = True) -> Segments:
    """Packed-sequence parameters of a batch.

    Args:
        batch: on its device.
        on_device: megatron-core's own modules read the borders there, as its fused rotary embedding does. Its plain
            one reads them on the host and would wait for the device.
    """
    borders, parents = batch.borders, batch.parents
    on_host = torch.tensor(borders, dtype=torch.int32)
    moved = on_host.to(batch.tokens.device, non_blocking=True)
    cu_seqlens = moved if on_device else on_host
    # The true longest segment: were it T for several segments, RoPE would switch to global positions.
    lengths = [end - start for start, end in zip(borders, borders[1:])]
    longest = max(lengths)
    parents = parents or (-1,) * len(lengths)
    key_lengths = [length + (lengths[parent] if parent >= 0 else 0) for length, parent in zip(lengths, parents)]
    key_rows = key_borders = None
    if key_lengths != lengths:
        ranges = [torch.arange(start, end) for start, end in zip(borders, borders[1:])]
        rows = [torch.cat([ranges[parent], own]) if parent >= 0 else own for own, parent in zip(ranges, parents)]
        key_rows = torch.cat(rows).to(batch.tokens.device)
        ends = list(accumulate(key_lengths, initial=0))
        key_borders = torch.tensor(ends, dtype=torch.int32).to(batch.tokens.device)
    return Segments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=max(key_lengths),
        borders=borders,
        trees=tuple(_trees(borders, parents, device=batch.tokens.device)),
        device_cu_seqlens=moved,
        key_rows=key_rows,
        device_cu_seqlens_keys=key_borders,
        positions=batch.positions,
    )


def _trees(
    borders: Sequence[int], parents: Sequence[int], *, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """`Segments.trees`."""
    roots = [number for number, parent in enumerate(parents) if parent < 0]
    for root, following in zip(roots, [*roots[1:], len(parents)]):
        assert all(parent == root for parent in parents[root + 1 : following]), "children follow their parent"
        start, end, mask = borders[root], borders[following], None
        if following > root + 1:
            lengths = torch.tensor([borders[at + 1] - borders[at] for at in range(root, following)])
            owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
            mask = ((owner[:, None] == owner) | (owner == 0)).tril()
        yield start, end, mask


class _Rotated(torch.autograd.Function):
    """Rotary embedding of x (T, A, D) by cos and sin (T, 1, D / 2), without saving x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Rotation) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(gradients[0], cos, -sin), None, None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    out_low, out_high = out.chunk(2, dim=-1)
    # Products are rounded before they are added, as in transformers; `addcmul` would not.
    torch.mul(low, cos, out=out_low).sub_(high * sin)
    torch.mul(high, cos, out=out_high).add_(low * sin)
    return out


class PackedAttention(nn.Module):
    """Rotary embedding and causal attention inside each segment, for megatron-core's self-attention."""

    applies_rotary = True
    """megatron-core's modules get query and key rotated already."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale
        # megatron-core's mark for torch.compile being wanted and able.
        self.rotate: Rotation = kernels.turned if config.bias_activation_fusion else _rotate

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Segments | Step | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query, key, value: (T, A, D), without rotary embedding.
            packed_seq_params: segment borders, or the new tokens of cached sequences.

        Returns:
            (T, A, D).
        """
        if isinstance(packed_seq_params, Step):
            return packed_seq_params.attend(self.layer_number, query, key, value, scale=self.scale)
        assert packed_seq_params is not None, "rows are always packed"
        cos, sin = packed_seq_params.cos, packed_seq_params.sin
        query, key = (_Rotated.apply(x, cos, sin, self.rotate) for x in (query, key))
        return self.attend(query, key, value, packed=packed_seq_params)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, packed: Segments) -> torch.Tensor:
        """Attention of rotated query and key, and value, (T, A, D), to (T, A, D)."""
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(query, key, value, packed)
        pieces = []
        for start, end, mask in packed.trees:
            whole = end - start == len(query)
            rows = (x if whole else x[start:end] for x in (query, key, value))
            q, k, v = (x.transpose(0, 1)[None] for x in rows)  # (1, A, L, D)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Segments) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        cu, keys = packed.device_cu_seqlens, packed.device_cu_seqlens
        assert cu is not None, "segments() sets them"
        if packed.key_rows is not None:
            k, v, keys = k[packed.key_rows], v[packed.key_rows], packed.device_cu_seqlens_keys
        longest, longest_keys = packed.max_seqlen_q, packed.max_seqlen_kv
        # A window of (-1, 0) is torch's way to say causal here; queries are aligned with the last keys.
        out = varlen_attn(q, k, v, cu, keys, longest, longest_keys, scale=self.scale, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor), "no auxiliary output was asked for"
        return out

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save."""
        return {}
