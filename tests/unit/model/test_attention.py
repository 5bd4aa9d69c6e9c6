"""Packed attention, SAM's folded relative positions and windows against plain statements of the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megavl.model.attention import PackedAttention, segments
from megavl.model.sam import _relative_attention, join_windows, split_windows


def test_packed_attention_equals_dense_mask(report_table: Any) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(37, 3, 8, dtype=torch.float64) for _ in range(3))
    borders = torch.tensor([0, 10, 11, 30, 37], dtype=torch.int32)
    packed = segments(borders, device=torch.device("cpu"), on_device=False)
    attention = PackedAttention(None, 1, AttnMaskType.causal, "self")
    found = attention(q, k, v, None, packed_seq_params=packed).view(37, 3, 8)
    owner = torch.bucketize(torch.arange(37), borders[1:], right=True)
    allowed = (owner[:, None] == owner[None, :]) & (torch.arange(37)[:, None] >= torch.arange(37)[None, :])
    scores = torch.einsum("qad,kad->aqk", q, k) * 8**-0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    error = (found - torch.einsum("aqk,kad->qad", weights, v)).abs().max().item()
    report_table(f"packed attention against a dense mask, fp64: {error:.1e} (tolerance 1e-12)")
    assert error < 1e-12
    assert packed.max_seqlen_q == 19


@pytest.mark.parametrize("grid", [3, 7])
def test_folded_relative_position_equals_bias(grid: int, report_table: Any) -> None:
    torch.manual_seed(0)
    n = grid * grid
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for _ in range(3))
    rel_h, rel_w = (torch.randn(2 * grid - 1, 8, dtype=torch.float64) for _ in range(2))
    bias = torch.empty(2, 3, n, n, dtype=torch.float64)
    for a in range(n):
        for b in range(n):
            row = rel_h[a // grid - b // grid + grid - 1] + rel_w[a % grid - b % grid + grid - 1]
            bias[:, :, a, b] = q[:, :, a] @ row
    expected = (q @ k.transpose(-1, -2) * 8**-0.5 + bias).softmax(-1) @ v
    error = (_relative_attention(q, k, v, rel_h, rel_w) - expected).abs().max().item()
    report_table(f"SAM relative positions on a {grid} x {grid} grid, fp64: {error:.1e} (tolerance 1e-12)")
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
