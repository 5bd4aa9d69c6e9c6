"""Small models of the three public kinds, built by transformers and saved in every layout that the public ones have.

The names of timm, open_clip and segment-anything are written here from those projects' own state dicts, independently
of the converter's tables.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from tests.unit.convert.conftest import HIGH_RES, TEXT, VISION

State = dict[str, Tensor]


@dataclass(frozen=True)
class PublicModels:
    """Models with every weight random, and the folders and files they were saved in, by layout."""

    llm: LlamaForCausalLM
    siglip: SiglipModel
    sam: SamModel
    llm_paths: dict[str, Path]
    siglip_paths: dict[str, Path]
    sam_paths: dict[str, Path]


def build(root: Path, tokenizer_dir: Path) -> PublicModels:
    """Build and save all of them below `root`."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**TEXT))
    # The activation of MegaVL's tower; the weights have nothing to do with it.
    vision = SiglipVisionConfig(**{**VISION, "vision_use_head": True})
    words = SiglipTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    siglip = SiglipModel(SiglipConfig(text_config=words.to_dict(), vision_config=vision.to_dict()))
    image_encoder = SamVisionConfig(**HIGH_RES)
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=128, patch_size=16, mask_input_channels=4)
    masks = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    sam = SamModel(
        SamConfig(
            vision_config=image_encoder.to_dict(),
            prompt_encoder_config=prompts.to_dict(),
            mask_decoder_config=masks.to_dict(),
        )
    )
    for model in (llm, siglip, sam):
        _randomise(model)
    return PublicModels(
        llm,
        siglip,
        sam,
        _save_llm(llm, root / "llm", tokenizer_dir),
        _save_siglip(siglip, root / "siglip"),
        _save_sam(sam, root / "sam"),
    )


def timm_names(state: State) -> State:
    """An image tower of transformers' SigLIP (names without prefix) as timm names it."""
    state, out = dict(state), {}
    width = state["post_layernorm.bias"].shape[0]
    out["pos_embed"] = state.pop("embeddings.position_embedding.weight")[None]
    out["attn_pool.latent"] = state.pop("head.probe")
    for kind in ("weight", "bias"):
        for layer in {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}:
            attention = f"encoder.layers.{layer}.self_attn."
            parts = [state.pop(f"{attention}{part}_proj.{kind}") for part in "qkv"]
            out[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
        stacked = state.pop(f"head.attention.in_proj_{kind}")
        out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = stacked[:width], stacked[width:]
    changes = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "self_attn.out_proj": "attn.proj",
        "layer_norm": "norm",
        "post_layernorm": "norm",
        "head.attention.out_proj": "attn_pool.proj",
        "head.layernorm": "attn_pool.norm",
        "head.mlp": "attn_pool.mlp",
    }
    return out | {_renamed(name, changes): value for name, value in state.items()}


def segment_anything_names(state: State) -> State:
    """transformers' SAM as segment-anything names it; of its other parts only the prefixes are right."""
    changes = {
        "vision_encoder.": "image_encoder.",
        "patch_embed.projection": "patch_embed.proj",
        "neck.conv1": "neck.0",
        "neck.layer_norm1": "neck.1",
        "neck.conv2": "neck.2",
        "neck.layer_norm2": "neck.3",
        "shared_image_embedding.": "prompt_encoder.pe_layer.",
    }
    blocks = {"image_encoder.layers": "image_encoder.blocks"}
    renamed = {_renamed(_renamed(name, changes), blocks): value for name, value in state.items()}
    return {re.sub(r"(blocks\.\d+\.)layer_norm", r"\1norm", name): value for name, value in renamed.items()}


def _renamed(name: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.dim() == 1 else 0.0))
    model.eval()


def _save_llm(model: LlamaForCausalLM, root: Path, tokenizer_dir: Path) -> dict[str, Path]:
    paths = {name: root / name for name in ("safetensors", "bin")}
    model.save_pretrained(paths["safetensors"], max_shard_size="1MB")
    paths["bin"].mkdir()
    _as_pickles(paths["safetensors"], paths["bin"])
    for path in paths.values():
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, path)
    assert (paths["safetensors"] / "model.safetensors.index.json").exists()
    return paths


def _as_pickles(source: Path, out: Path) -> None:
    """The same folder as transformers 4 could write it, in files of torch.save; transformers 5 cannot."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    names = {name: name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin") for name in shards}
    for old, new in names.items():
        torch.save(load_file(source / old), out / new)
    index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", out)


def _save_siglip(model: SiglipModel, root: Path) -> dict[str, Path]:
    root.mkdir()
    model.save_pretrained(root / "transformers")
    image = {key: value.contiguous() for key, value in model.vision_model.state_dict().items()}
    save_file(image, root / "bare.safetensors")
    timm = {key: value.contiguous() for key, value in timm_names(image).items()}
    save_file(timm, root / "timm.safetensors")
    folder = root / "open_clip"
    folder.mkdir()
    text = {"text.transformer.resblocks.0.ln_1.weight": torch.ones(4), "logit_scale": torch.ones(())}
    torch.save(
        {f"visual.trunk.{key}": value for key, value in timm.items()} | text, folder / "open_clip_pytorch_model.bin"
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    return {
        "transformers": root / "transformers",
        "transformers without prefix": root / "bare.safetensors",
        "timm": root / "timm.safetensors",
        "open_clip": folder,
    }


def _save_sam(model: SamModel, root: Path) -> dict[str, Path]:
    root.mkdir()
    model.save_pretrained(root / "transformers")
    torch.save(segment_anything_names(model.state_dict()), root / "sam_vit_tiny.pth")
    return {"transformers": root / "transformers", "segment-anything": root / "sam_vit_tiny.pth"}
