"""Keys and values of the sequences that generation has read, and one step that adds tokens to them.

megatron-core's own static context cannot serve here. It holds one length for a whole batch and takes only single tokens
after the prompt. It also keeps keys without their rotation, so every token would rotate all keys of every layer again.

Legend: R rows (sequences), N tokens of a step, L positions, A attention heads of this rank, D channels per head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.nn import functional as F

_GRAIN = 64
"""The cache grows by multiples of this many positions."""


class KeyValueCache:
    """Keys and values of R sequences that grow independently; row r holds `lengths[r]` tokens."""

    def __init__(
        self,
        *,
        rows: int,
        heads: int,
        head_dim: int,
        angles: Callable[[int], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """An empty cache; memory is taken by `reserve`, or when a step needs more.

        Args:
            rows: sequences it can hold.
            heads: attention heads of this rank.
            angles: rotary angles (L, 1, 1, D) in fp32 of the first L positions, from the model itself.
            dtype: dtype of the model. On the CPU a bf16 model is cached in fp32: torch's attention of single queries
                is 3 to 10 times faster there.
        """
        self.lengths = [0] * rows
        self.capacity = 0
        self._shape = (rows, heads, head_dim)
        self._angles, self._dtype, self._device = angles, dtype, device
        self._stored = torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cos = self._sin = torch.empty(0, device=device)

    @torch.inference_mode()
    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in every row."""
        if length <= self.capacity:
            return
        self.capacity = -(-length // _GRAIN) * _GRAIN
        angles = self._angles(self.capacity)[:, 0]  # (L, 1, D)
        self._cos = angles.cos().to(self._dtype)
        # Swapping the halves of a vector and negating the first one is a roll, with the sign kept in the table.
        half = torch.ones(angles.shape[-1], device=angles.device)
        half[: angles.shape[-1] // 2] = -1
        self._sin = angles.sin().to(self._dtype) * half.to(self._dtype)
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (self._larger(keys), self._larger(values))

    def extend(self, row: int, count: int) -> Extension:
        """A step in which `row` gets `count` tokens; `advance` must follow it."""
        start = self.lengths[row]
        self._grow(start + count)
        span = slice(start, start + count)
        mask = None
        if start and count > 1:
            mask = torch.ones(count, start + count, dtype=torch.bool, device=self._device).tril(start)
        return Extension(
            qkv_format="thd",
            cache=self,
            cos=self._cos[span],
            sin=self._sin[span],
            mask=mask,
            rows=(row,),
            counts=(count,),
        )

    def append(self, count: int) -> Decoding:
        """A step in which each of the first `count` rows gets one token; `advance` must follow it."""
        lengths = self.lengths[:count]
        longest = max(lengths) + 1
        self._grow(longest)
        positions = torch.tensor(lengths, device=self._device)
        mask = None
        if min(lengths) + 1 < longest:
            hidden = torch.arange(longest, device=self._device) > positions[:, None]
            mask = torch.zeros(hidden.shape, dtype=self._stored, device=self._device)
            mask = mask.masked_fill(hidden, float("-inf"))[:, None, None]  # (R, 1, 1, L)
        return Decoding(
            qkv_format="thd",
            cache=self,
            cos=self._cos[positions],
            sin=self._sin[positions],
            mask=mask,
            rows=tuple(range(count)),
            counts=(1,) * count,
            index=torch.arange(count, device=self._device),
            positions=positions,
        )

    def advance(self, step: Step) -> None:
        """Count the tokens of a step that ran; without this call a step leaves no trace in the cache."""
        for row, count in zip(step.rows, step.counts):
            self.lengths[row] += count

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of a row after its first `length`."""
        assert 0 <= length <= self.lengths[row], f"row {row} holds {self.lengths[row]} tokens, not {length}"
        self.lengths[row] = length

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Put the sequence of row `source` into row `target`; `source` is empty afterwards."""
        if source != target:
            length = self.lengths[source]
            for stored in (tensor for pair in self._layers.values() for tensor in pair):
                stored[target, :, :length] = stored[source, :, :length]
            self.lengths[target] = length
        self.lengths[source] = 0

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (R, A, L, D) of a decoder layer."""
        if number not in self._layers:
            self._layers[number] = (self._empty(), self._empty())
        return self._layers[number]

    def _grow(self, length: int) -> None:
        if length > self.capacity:
            self.reserve(max(length, 2 * self.capacity))

    def _empty(self) -> torch.Tensor:
        rows, heads, channels = self._shape
        # Zeros, because what a mask hides must still be finite: a NaN would survive its weight of zero.
        return torch.zeros(rows, heads, self.capacity, channels, dtype=self._stored, device=self._device)

    def _larger(self, old: torch.Tensor) -> torch.Tensor:
        new = self._empty()
        new[:, :, : old.shape[2]] = old
        return new


@dataclass(kw_only=True)
class Step(PackedSeqParams, ABC):
    """New tokens of some rows, one after the other in one packed row; travels to every attention layer."""

    cache: KeyValueCache
    cos: torch.Tensor
    """(N, 1, D)."""
    sin: torch.Tensor
    """(N, 1, D), the first half negated."""
    mask: torch.Tensor | None
    """Added to scores, or which keys each query sees; None where the kernel hides enough itself."""
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    """New tokens of each row."""

    @property
    def tokens(self) -> int:
        """N."""
        return sum(self.counts)

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """Store the new keys and values of a layer and attend to all of their rows.

        Args:
            query, key, value: (N, A, D), without rotary embedding.
            scale: of the scores; None for D ** -0.5.

        Returns:
            (N, A, D).
        """

    @abstractmethod
    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (R, 1, H) at the last token of each row, of (N, 1, H) at all of them."""

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.sin


@dataclass(kw_only=True)
class Extension(Step):
    """Several tokens of one row: a prompt, or a turn after a prefix."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """See `Step.attend`."""
        (row,), (count,) = self.rows, self.counts
        start = self.cache.lengths[row]
        query, key, value = (x.transpose(0, 1) for x in (self._rotated(query), self._rotated(key), value))
        keys, values = (stored[row, :, : start + count] for stored in self.cache.layer(layer))
        keys[:, start:] = key
        values[:, start:] = value
        if start:
            key, value = keys, values
        out = F.scaled_dot_product_attention(
            query.to(key.dtype)[None],
            key[None],
            value[None],
            attn_mask=self.mask,
            is_causal=not start,
            scale=scale,
        )
        return out[0].transpose(0, 1).to(query.dtype)

    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Step.last`."""
        return hidden[-1:]


@dataclass(kw_only=True)
class Decoding(Step):
    """One token of each of the first R rows."""

    index: torch.Tensor
    """int64 (R,), the rows."""
    positions: torch.Tensor
    """int64 (R,), positions of their tokens."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
    ) -> torch.Tensor:
        """See `Step.attend`."""
        keys, values = self.cache.layer(layer)
        rows, longest = len(self.rows), max(self.cache.lengths[: len(self.rows)]) + 1
        turned, key = (self._rotated(x).to(keys.dtype) for x in (query, key))
        value = value.to(values.dtype)
        if self.mask is None:
            keys[:rows, :, longest - 1] = key
            values[:rows, :, longest - 1] = value
        else:
            keys[self.index, :, self.positions] = key
            values[self.index, :, self.positions] = value
        out = F.scaled_dot_product_attention(
            turned[:, :, None],
            keys[:rows, :, :longest],
            values[:rows, :, :longest],
            attn_mask=self.mask,
            scale=scale,
        )
        return out[:, :, 0].to(query.dtype)

    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Step.last`."""
        return hidden
