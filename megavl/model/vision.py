"""The vision encoders with their adaptor: canvases to language-width embeddings.

Legend: I images, P tokens per image, C canvas side in pixels, W tower width, H hidden.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

from megavl.config.model import ModelConfig
from megavl.config.presets import CLIP_MEAN, CLIP_STD, HALF
from megavl.model.adaptor import build_adaptor
from megavl.model.sam import SamTower
from megavl.model.siglip import SiglipTower, run_block

Features = tuple[torch.Tensor, ...]
"""Outputs of the towers: (low,) or (low, high), each (I, P, W)."""


class VisionTowers(nn.Module):
    """The encoders alone."""

    def __init__(self, config: ModelConfig, *, recompute: bool = False, compiled: bool = False) -> None:
        super().__init__()
        self.clip_mean: torch.Tensor
        self.clip_std: torch.Tensor
        self.siglip_mean_std: torch.Tensor
        self.low_size = config.siglip.image_size
        self.siglip = SiglipTower(config.siglip, recompute=recompute, compiled=compiled)
        self.sam = SamTower(config.sam, recompute=recompute, compiled=compiled) if config.sam else None
        for name, values in (("clip_mean", CLIP_MEAN), ("clip_std", CLIP_STD), ("siglip_mean_std", HALF)):
            # Stay fp32 in a bf16 model: `model.build` casts parameters only. Images are normalised in fp32, cast last.
            # Their device is named because generation builds the module on the meta device, which keeps no values.
            self.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)

    def encode(self, canvases: torch.Tensor, *, rerun: Collection[str] = ()) -> Features:
        """Run the towers.

        Args:
            canvases: uint8 (I, 3, C, C).
            rerun: of `siglip` and `sam`, towers that keep nothing but their input and run again for their gradient.

        Returns:
            (low,) or (low, high), each (I, P, W), in the dtype of the weights.
        """
        dtype = self.siglip.pos_embed.dtype
        pixels = canvases.to(torch.promote_types(dtype, torch.float32)) / 255.0
        low = pixels
        if self.sam is not None:
            size = (self.low_size, self.low_size)
            low = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        low = ((low - self.siglip_mean_std) / self.siglip_mean_std).to(dtype)
        low_features = run_block(self.siglip, low, recompute="siglip" in rerun)
        if self.sam is None:
            return (low_features,)
        high = ((pixels - self.clip_mean) / self.clip_std).to(dtype)
        return low_features, run_block(self.sam, high, recompute="sam" in rerun)


class VisionEncoder(VisionTowers):
    """Canvases to language-width embeddings."""

    def __init__(self, config: ModelConfig, *, recompute: bool = False, compiled: bool = False) -> None:
        super().__init__(config, recompute=recompute, compiled=compiled)
        self.image_tokens, self.out_width = config.image_tokens, config.llm.hidden_size
        self.adaptor = build_adaptor(config)

    @property
    def trains(self) -> bool:
        """Whether any weight wants a gradient."""
        return any(weight.requires_grad for weight in self.parameters())

    def project(self, features: Features) -> torch.Tensor:
        """Features of the towers to (I, P, H)."""
        out: torch.Tensor = self.adaptor(features[0], features[1] if len(features) > 1 else None)
        return out

    def forward(self, canvases: torch.Tensor) -> torch.Tensor:
        """uint8 (I, 3, C, C) to (I, P, H) in the dtype of the weights."""
        return self.project(self.encode(canvases))
