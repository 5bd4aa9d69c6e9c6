"""Packed attention, SAM's folded relative positions and windows against plain statements of the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megavl.data.batch import make_batch
from megavl.model import sam
from megavl.model.attention import PackedAttention, segments
from megavl.model.sam import _by_rows, _folded, _relative_attention, join_windows, split_windows

BORDERS = torch.tensor([0, 10, 11, 30, 37], dtype=torch.int32)
ANGLES = torch.arange(19.0)[:, None] * 10000.0 ** -(torch.arange(4) / 4)
"""Of the first 19 positions, for each of the four pairs of channels."""


def packed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compiles: bool) -> torch.Tensor:
    """What the decoder calls, (T, A, D)."""
    packed = segments(make_batch(torch.zeros(37, dtype=torch.int64), borders=BORDERS.tolist()))
    assert packed.max_seqlen_q == 19
    packed.set_angles(torch.cat([ANGLES, ANGLES], dim=-1)[:, None, None], dtype=q.dtype)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=3,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=compiles,
    )
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    found: torch.Tensor = attention(q, k, v, None, packed_seq_params=packed)
    return found.view(q.shape)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A mask over all pairs, and rotation of each token by its position in its segment."""
    tokens = torch.arange(37)
    owner = torch.bucketize(tokens, BORDERS[1:], right=True)
    allowed = (owner[:, None] == owner[None, :]) & (tokens[:, None] >= tokens[None, :])
    turns = torch.exp(1j * ANGLES.double()[tokens - BORDERS[owner]])[:, None]
    q, k = (torch.complex(*x.chunk(2, dim=-1)) * turns for x in (q, k))
    q, k = (torch.cat([x.real, x.imag], dim=-1) for x in (q, k))
    scores = torch.einsum("qad,kad->aqk", q, k) * 8**-0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("aqk,kad->qad", weights, v)


@pytest.mark.parametrize("compiles", [False, True], ids=["in place", "in the form for torch.compile"])
def test_packed_attention_equals_dense_mask(compiles: bool, report_table: Any) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(37, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(37, 3, 8, dtype=torch.float64)
    found, expected = (
        [out, *torch.autograd.grad((out * weight).sum(), inputs)]
        for out in (packed_attention(*inputs, compiles=compiles), dense_attention(*inputs))
    )
    # The tables of cosines are made in fp32, as megatron-core's are.
    error = max(float((a - b).abs().max()) for a, b in zip(found, expected))
    report_table(f"packed rotary attention and gradients against a dense mask, fp64: {error:.1e} (tolerance 1e-6)")
    assert error < 1e-6


def relative_inputs(grid: int) -> tuple[torch.Tensor, ...]:
    """q, k, v of two images and three heads in fp64, and the tables of relative positions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, grid * grid, 8, dtype=torch.float64) for _ in range(3))
    return q, k, v, *(torch.randn(2 * grid - 1, 8, dtype=torch.float64) for _ in range(2))


def plain_relative(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    """The rule with a bias for every pair of positions."""
    rel_h, rel_w = tables
    grid = (rel_h.shape[0] + 1) // 2
    place = torch.arange(grid * grid)
    rows = place[:, None] // grid - place[None, :] // grid + grid - 1
    columns = place[:, None] % grid - place[None, :] % grid + grid - 1
    bias = torch.einsum("nhqd,qkd->nhqk", q, rel_h[rows] + rel_w[columns])
    return (q @ k.transpose(-1, -2) * 8**-0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize("way", [_folded, _by_rows])
@pytest.mark.parametrize("grid", [3, 7, 14])
def test_relative_positions_are_a_bias(grid: int, way: Any, report_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, one of which CUDA and training take, and the other inference on the CPU."""
    monkeypatch.setattr(sam, "_by_rows", way)
    inputs = relative_inputs(grid)
    error = (_relative_attention(*inputs) - plain_relative(*inputs)).abs().max().item()
    report_table(f"SAM relative positions, {grid} x {grid}, {way.__name__}, fp64: {error:.1e} (tolerance 1e-12)")
    assert error < 1e-12


def test_gradients_through_relative_positions(report_table: Any) -> None:
    inputs = relative_inputs(5)
    found, expected = (
        torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for function, leaves in (
            (function, [value.clone().requires_grad_() for value in inputs])
            for function in (_relative_attention, plain_relative)
        )
    )
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
    report_table(f"gradients of SAM's relative attention, fp64: {error:.1e} (relative, tolerance 1e-12)")
    assert error < 1e-12


@pytest.mark.parametrize(("grid", "window"), [(16, 7), (14, 7), (5, 7)])
def test_windows_pad_bottom_and_right(grid: int, window: int) -> None:
    x = torch.arange(2 * grid * grid * 3, dtype=torch.float32).view(2, grid, grid, 3) + 1
    windows = split_windows(x, window)
    count = -(-grid // window)
    assert windows.shape == (2 * count * count, window, window, 3)
    assert torch.equal(windows[0, : min(window, grid), : min(window, grid)], x[0, :window, :window])
    assert (windows == 0).sum() == 2 * 3 * ((count * window) ** 2 - grid**2)
    assert torch.equal(join_windows(windows, window, grid=grid), x)
