"""SAM vision tower with DeepSeek-VL's HD branch (deepseek-ai/DeepSeek-VL `deepseek_vl/models/sam.py`).

Legend: I images (or windows), G grid side, W trunk width, C neck channels, D channels per head.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from megavl.config.model import SamConfig
from megavl.model.siglip import PatchEmbed, init_linear, run_block

_QUERIES = 64
"""Queries for which the CPU holds a bias to every key at once: at the published size 1 MiB a head."""


class SamTower(nn.Module):
    """High-resolution features at the low-resolution grid; parameter names are the released checkpoint's."""

    def __init__(self, config: SamConfig, *, recompute: bool = False, compiled: bool = False) -> None:
        super().__init__()
        self.recompute, self.compiled = recompute, compiled
        self.hd_block = config.global_attn_indexes[0]
        self.upsampled = 3 * config.grid // 2
        self.patch_embed = PatchEmbed(config.width, patch_size=config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.width))
        self.blocks = nn.ModuleList(
            _Block(config, window=0 if index in config.global_attn_indexes else config.window_size)
            for index in range(config.depth)
        )
        self.blocks.apply(init_linear)
        channels = config.neck_channels
        self.neck = _neck(config.width, channels, eps=config.layer_norm_eps)
        self.neck_hd = copy.deepcopy(self.neck)
        self.downsamples = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False),
            nn.Conv2d(2 * channels, 4 * channels, kernel_size=3, stride=2, padding=1, bias=False),
        )
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixels: (I, 3, R, R), normalised.

        Returns:
            (I, (3G/8)^2, 4C), row-major: after the x1.5 interpolation two stride-2 convolutions leave 3/8 of the grid.
        """
        x = self.patch_embed(pixels).permute(0, 2, 3, 1) + self.pos_embed  # (I, G, G, W)
        after_first_global = x
        for index, block in enumerate(self.blocks):
            x = run_block(block, x, recompute=self.recompute, compiled=self.compiled)
            if index == self.hd_block:
                after_first_global = x
        main = self._downsample(self.neck(x.permute(0, 3, 1, 2)))
        detail = self._downsample(self.neck_hd(after_first_global.permute(0, 3, 1, 2)))
        return (main + detail * self.hd_alpha_downsamples).flatten(2).transpose(1, 2)

    def _downsample(self, x: torch.Tensor) -> torch.Tensor:
        size = (self.upsampled, self.upsampled)
        # The reference interpolates in fp32 also where the model is bf16.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = F.interpolate(wide, size=size, mode="bilinear", align_corners=False).to(x.dtype)
        out: torch.Tensor = self.downsamples(wide)
        return out


def _neck(width: int, channels: int, *, eps: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        ChannelLayerNorm(channels, eps=eps),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        ChannelLayerNorm(channels, eps=eps),
    )


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of (I, C, G, G), at least in fp32: the reference's fp16 variance loses 3 bits."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        last = x.permute(0, 2, 3, 1).to(wide)
        out = F.layer_norm(last, last.shape[-1:], self.weight.to(wide), self.bias.to(wide), self.eps)
        return out.to(x.dtype).permute(0, 3, 1, 2)


class _Block(nn.Module):
    def __init__(self, config: SamConfig, *, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = _Attention(config.width, heads=config.heads, grid=window or config.grid)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config.width, config.mlp_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        if self.window:
            attended = join_windows(self.attn(split_windows(normed, self.window)), self.window, grid=x.shape[1])
        else:
            attended = self.attn(normed)
        x = x + attended
        return x + self.mlp(self.norm2(x))


class _Mlp(nn.Module):
    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class _Attention(nn.Module):
    """Attention over a G x G grid with decomposed relative positions."""

    def __init__(self, width: int, *, heads: int, grid: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, grid, _, width = x.shape
        qkv = self.qkv(x).view(images, grid * grid, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (I, heads, G*G, D)
        out = _relative_attention(q, k, v, self.rel_pos_h, self.rel_pos_w)
        return self.proj(out.transpose(1, 2).reshape(images, grid, grid, width))


def _relative_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """softmax(q k / sqrt(D) + q Rh + q Rw) v without a bias matrix for all queries.

    The bias of query (i, j) and key (i', j') is q . Rh[i - i'] + q . Rw[j - j'], with q unscaled: 2G values per query.

    Args:
        q, k, v: (I, heads, G*G, D).
        rel_h, rel_w: (2G - 1, D); row i - i' + G - 1.

    Returns:
        (I, heads, G*G, D).
    """
    grid = (rel_h.shape[0] + 1) // 2
    steps = torch.arange(grid, device=q.device)
    distance = steps[:, None] - steps[None, :] + grid - 1
    on_grid = q.unflatten(2, (grid, grid))  # (I, heads, G, G, D)
    bias_h = torch.einsum("nhijd,ikd->nhijk", on_grid, rel_h[distance])  # (I, heads, G, G, G)
    bias_w = torch.einsum("nhijd,jkd->nhijk", on_grid, rel_w[distance])
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias_h, bias_w))
    # With gradients torch's fused attention takes no bias; on a GPU one large kernel is better than many small ones.
    attend = _folded if tracked or q.is_cuda else _by_rows
    return attend(q, k, v, bias_h, bias_w)


def _folded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor
) -> torch.Tensor:
    """The biases become channels of q, and one-hot rows of i' and j' the matching channels of k."""
    dim, grid = q.shape[-1], bias_h.shape[-1]
    one_hot = torch.eye(grid, dtype=k.dtype, device=k.device)
    rows = one_hot.repeat_interleave(grid, dim=0).expand(*k.shape[:2], -1, -1)
    columns = one_hot.repeat(grid, 1).expand(*k.shape[:2], -1, -1)
    wide_q = torch.cat([q * dim**-0.5, bias_h.flatten(2, 3), bias_w.flatten(2, 3)], dim=-1)
    wide_k = torch.cat([k, rows, columns], dim=-1)
    # Fused kernels want v as wide as q and k.
    wide_v = F.pad(v, (0, 2 * grid))
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)[..., :dim]


def _by_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor
) -> torch.Tensor:
    """A few rows of the grid at a time, so that their bias stays in the processor's cache."""
    grid = bias_h.shape[-1]
    step = -(-_QUERIES // grid)
    pieces = []
    for start in range(0, grid, step):
        rows = slice(start, start + step)
        bias = bias_h[:, :, rows, :, :, None] + bias_w[:, :, rows, :, None, :]
        queries = q.unflatten(2, (grid, grid))[:, :, rows].flatten(2, 3)
        pieces.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=bias.flatten(2, 3).flatten(3)))
    return torch.cat(pieces, dim=2)


def split_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """(I, G, G, W) to (I * n * n, window, window, W), zero-padded at the bottom and right; padding is not masked."""
    images, grid, _, width = x.shape
    count = -(-grid // window)
    pad = count * window - grid
    x = F.pad(x, (0, 0, 0, pad, 0, pad))
    x = x.view(images, count, window, count, window, width).transpose(2, 3)
    return x.reshape(-1, window, window, width)


def join_windows(x: torch.Tensor, window: int, *, grid: int) -> torch.Tensor:
    """Inverse of `split_windows`; the padding is removed."""
    count = -(-grid // window)
    x = x.view(-1, count, count, window, window, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, count * window, count * window, x.shape[-1])[:, :grid, :grid].contiguous()
