"""SigLIP vision tower (deepseek-ai/DeepSeek-VL `deepseek_vl/models/siglip_vit.py`).

Legend: I images, P patches (grid x grid), W width, R input side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megavl.config.model import SiglipConfig
from megavl.model.kernels import Kernel


class SiglipTower(nn.Module):
    """Patches to features; parameter names are the released checkpoint's."""

    def __init__(self, config: SiglipConfig, *, recompute: bool = False, compiled: bool = False) -> None:
        super().__init__()
        self.recompute, self.compiled = recompute, compiled
        self.patch_embed = PatchEmbed(config.width, patch_size=config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width))
        self.blocks = nn.ModuleList(
            _Block(config.width, heads=config.heads, mlp_dim=config.mlp_dim, eps=config.layer_norm_eps)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks.apply(init_linear)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixels: (I, 3, R, R), normalised.

        Returns:
            (I, P, W), patches in row-major order.
        """
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute, compiled=self.compiled)
        out: torch.Tensor = self.norm(x)
        return out


class _Block(nn.Module):
    def __init__(self, width: int, *, heads: int, mlp_dim: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _Attention(width, heads=heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(width, mlp_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, patches, width = x.shape
        qkv = self.qkv(x).view(images, patches, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (I, heads, P, D)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(images, patches, width))


class _Mlp(nn.Module):
    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The released tower uses the exact erf form, although SigLIP itself was trained with tanh.
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches as one strided convolution: (I, 3, R, R) to (I, W, R/patch, R/patch)."""

    def __init__(self, width: int, *, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(pixels)
        return out


def init_linear(module: nn.Module) -> None:
    """Fresh weights of a tower's Linear layers, as timm and segment-anything's ViTs start: std 0.02, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def run_block(block: nn.Module, x: torch.Tensor, *, recompute: bool, compiled: bool = False) -> torch.Tensor:
    """Run a block.

    Args:
        recompute: where gradients are wanted, keep only the block's input for the backward pass.
        compiled: where none are wanted, run it through torch.compile.
    """
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())
    out: torch.Tensor
    if recompute and trained:
        out = checkpoint(block, x, use_reentrant=False)
    elif compiled and not trained and not x.requires_grad:
        out = _compiled(type(block).forward)(block, x)
    else:
        out = block(x)
    return out


@cache
def _compiled(forward: Callable[..., Any]) -> Kernel:
    """The forward pass of all blocks of a class: those of equal sizes share a compilation."""
    return Kernel(forward)
