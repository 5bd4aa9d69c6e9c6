"""Shipped model sizes and image geometries, one row each.

`1b` and `7b` are the released models (deepseek-ai/DeepSeek-VL). `tiny-hybrid` and `tiny-siglip` have the same topology
at a size that trains on two CPU cores: low-resolution grid g, high-resolution grid 8g/3, x1.5 interpolation, two
stride-2 convolutions. `small` is for measuring on a CPU: matrix products dominate its steps, as they do on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SIGLIP = {"image_size": 384, "patch_size": 16, "width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}
_TINY_SIGLIP = {"image_size": 48, "patch_size": 16, "width": 64, "depth": 3, "heads": 4, "mlp_dim": 256}
_TINY_LLM = {
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
_ONE_TOWER = {"kind": "mlp_gelu", "depth": 2}
_TWO_TOWERS = {"kind": "low_high_hybrid_split_mlp_gelu", "depth": 2}

MODELS: dict[str, dict[str, Any]] = {
    "1b": {
        "llm": {
            "hidden_size": 2048,
            "ffn_hidden_size": 5632,
            "num_layers": 24,
            "num_attention_heads": 16,
            "vocab_size": 102400,
        },
        "siglip": _SIGLIP,
        "adaptor": _ONE_TOWER,
    },
    "7b": {
        "llm": {
            "hidden_size": 4096,
            "ffn_hidden_size": 11008,
            "num_layers": 30,
            "num_attention_heads": 32,
            "vocab_size": 102400,
        },
        "siglip": _SIGLIP,
        "sam": {
            "image_size": 1024,
            "patch_size": 16,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "window_size": 14,
            "global_attn_indexes": [2, 5, 8, 11],
            "neck_channels": 256,
        },
        "adaptor": _TWO_TOWERS,
    },
    "tiny-hybrid": {
        "llm": _TINY_LLM,
        "siglip": _TINY_SIGLIP,
        "sam": {
            "image_size": 128,
            "patch_size": 16,
            "width": 64,
            "depth": 3,
            "heads": 2,
            "mlp_dim": 256,
            "window_size": 5,
            "global_attn_indexes": [1, 2],
            "neck_channels": 16,
        },
        "adaptor": _TWO_TOWERS,
        "image_token_id": 3,
    },
    "small": {
        "llm": {
            "hidden_size": 512,
            "ffn_hidden_size": 1408,
            "num_layers": 12,
            "num_attention_heads": 8,
            "vocab_size": 8192,
            "max_position_embeddings": 4096,
        },
        "siglip": {"image_size": 192, "patch_size": 16, "width": 256, "depth": 6, "heads": 4, "mlp_dim": 1024},
        "sam": {
            "image_size": 512,
            "patch_size": 16,
            "width": 256,
            "depth": 6,
            "heads": 4,
            "mlp_dim": 1024,
            "window_size": 14,
            "global_attn_indexes": [2, 5],
            "neck_channels": 64,
        },
        "adaptor": _TWO_TOWERS,
        "image_token_id": 3,
    },
    "tiny-siglip": {"llm": _TINY_LLM, "siglip": _TINY_SIGLIP, "adaptor": _ONE_TOWER, "image_token_id": 3},
}
"""`model:` mappings by preset name; the keys of a recipe replace their values."""
CUSTOM = "custom"
"""The `preset:` of a model that is none of these; a recipe that says so states every size."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """How an image becomes a square canvas: resized (side truncated), centred, padded, as in the original processor."""

    canvas_size: int
    """Side of the square uint8 canvas, pixels."""
    low_size: int
    """Side of the SigLIP input, pixels; equals canvas_size without SAM."""
    patch_size: int
    """Side of a SigLIP patch, pixels."""
    background: tuple[int, int, int]
    """RGB of the padding: int(255 x mean)."""
    min_size: int = 14
    """Smallest side after the resize, pixels."""

    @property
    def tokens(self) -> int:
        """Positions that one image takes in the sequence."""
        return (self.low_size // self.patch_size) ** 2


SIGLIP_BACKGROUND = (127, 127, 127)
HYBRID_BACKGROUND = (122, 116, 104)

IMAGE_PRESETS: dict[str, ImageGeometry] = {
    "siglip-384": ImageGeometry(canvas_size=384, low_size=384, patch_size=16, background=SIGLIP_BACKGROUND),
    "hybrid-1024": ImageGeometry(canvas_size=1024, low_size=384, patch_size=16, background=HYBRID_BACKGROUND),
    "small": ImageGeometry(canvas_size=512, low_size=192, patch_size=16, background=HYBRID_BACKGROUND),
    "tiny-hybrid": ImageGeometry(canvas_size=128, low_size=48, patch_size=16, background=HYBRID_BACKGROUND),
    "tiny-hybrid-even": ImageGeometry(canvas_size=128, low_size=48, patch_size=8, background=HYBRID_BACKGROUND),
    "tiny-siglip": ImageGeometry(canvas_size=48, low_size=48, patch_size=16, background=SIGLIP_BACKGROUND),
    "tiny-siglip-even": ImageGeometry(canvas_size=48, low_size=48, patch_size=8, background=SIGLIP_BACKGROUND),
}
"""Image geometries by `--image-preset`."""
