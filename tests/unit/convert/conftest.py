"""transformers' own tiny models, saved as Hugging Face folders."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
)

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 16,
    "hidden_act": "gelu",
    "vision_use_head": False,
}
HIGH_RES = {
    "hidden_size": 64,
    "mlp_dim": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 16,
    "window_size": 5,
    "global_attn_indexes": [1, 2],
    "output_channels": 16,
}


def build(name: str) -> torch.nn.Module:
    """Transformers' model of a tiny preset with every weight random, none left at an initial 0 or 1."""
    torch.manual_seed(0)
    if name == "tiny-hybrid":
        config = DeepseekVLHybridConfig(
            text_config=dict(TEXT),
            vision_config=dict(VISION),
            high_res_vision_config=dict(HIGH_RES),
            image_token_id=3,
            tie_word_embeddings=False,
        )
        model = DeepseekVLHybridForConditionalGeneration(config)
    else:
        model = DeepseekVLForConditionalGeneration(
            DeepseekVLConfig(
                text_config=dict(TEXT), vision_config=dict(VISION), image_token_id=3, tie_word_embeddings=False
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.dim() == 1 else 0.0))
    return model.eval()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders saved by transformers itself, by preset name."""
    folders = {}
    for name in ("tiny-hybrid", "tiny-siglip"):
        folders[name] = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(folders[name])
    return folders
