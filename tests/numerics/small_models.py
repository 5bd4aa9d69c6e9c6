"""Small DeepSeek-VL models of awkward shapes, and one with the true grids.

Every hybrid has the topology of the 7B: the SAM grid is 8/3 of the SigLIP grid, and the x1.5 interpolation and two
stride-2 convolutions follow. Most SAM grids are no multiple of the window.
"""

from __future__ import annotations

from typing import Any

from megavl.config.load import load_model_config
from megavl.config.model import AdaptorConfig, DecoderConfig, ModelConfig, SamConfig, SiglipConfig


def _llm(hidden: int, heads: int, **changes: Any) -> DecoderConfig:
    sizes = {"ffn_hidden_size": 2 * hidden + 40, "num_layers": 2, "vocab_size": 331, "max_position_embeddings": 4096}
    return DecoderConfig(hidden_size=hidden, num_attention_heads=heads, **(sizes | changes))


def _siglip(grid: int, patch: int, width: int, heads: int, depth: int) -> SiglipConfig:
    sizes = {"patch_size": patch, "width": width, "heads": heads, "depth": depth, "mlp_dim": 3 * width + 4}
    return SiglipConfig(image_size=grid * patch, **sizes)


def _sam(
    grid: int, patch: int, window: int, width: int, heads: int, depth: int, neck: int, global_at: tuple[int, ...]
) -> SamConfig:
    sizes = {"patch_size": patch, "window_size": window, "width": width, "heads": heads, "depth": depth}
    return SamConfig(
        image_size=grid * patch,
        mlp_dim=2 * width + 6,
        neck_channels=neck,
        global_attn_indexes=global_at,
        **sizes,
    )


def _hybrid(llm: DecoderConfig, siglip: SiglipConfig, sam: SamConfig) -> ModelConfig:
    adaptor = AdaptorConfig(kind="low_high_hybrid_split_mlp_gelu", depth=2)
    return ModelConfig(preset="tiny-hybrid", llm=llm, siglip=siglip, sam=sam, adaptor=adaptor, image_token_id=3)


def _low_only(llm: DecoderConfig, siglip: SiglipConfig) -> ModelConfig:
    adaptor = AdaptorConfig(kind="mlp_gelu", depth=2)
    return ModelConfig(preset="tiny-siglip", llm=llm, siglip=siglip, adaptor=adaptor, image_token_id=3)


MODELS: dict[str, ModelConfig] = {
    "tiny-hybrid": load_model_config("tiny-hybrid"),
    "tiny-siglip": load_model_config("tiny-siglip"),
    "grid 16 window 7": _hybrid(_llm(96, 6), _siglip(6, 8, 48, 3, 3), _sam(16, 8, 7, 96, 3, 4, 12, (2, 3))),
    "grid 24 window 9": _hybrid(_llm(60, 2), _siglip(9, 14, 40, 1, 2), _sam(24, 5, 9, 36, 1, 3, 10, (0, 2))),
    "grid 8 window 4": _hybrid(_llm(64, 1), _siglip(3, 16, 32, 8, 1), _sam(8, 16, 4, 48, 6, 5, 8, (1, 4))),
    "grid 8 window 11": _hybrid(_llm(80, 5), _siglip(3, 10, 24, 2, 2), _sam(8, 7, 11, 40, 5, 2, 6, (1,))),
    "siglip grid 5": _low_only(_llm(72, 3), _siglip(5, 14, 56, 7, 4)),
    "siglip grid 7": _low_only(_llm(52, 1, rope_theta=5000.0, rms_norm_eps=1e-5), _siglip(7, 6, 20, 1, 2)),
}
"""By name; four of them have images with odd sides."""

TRUE_GRIDS = _hybrid(_llm(64, 2), _siglip(24, 16, 64, 4, 3), _sam(64, 16, 14, 64, 2, 4, 16, (1, 3)))
"""SAM 1024 / 16 / window 14 and SigLIP 384 / 16 as in the 7B, at small width."""
