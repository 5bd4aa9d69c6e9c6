"""Configuration files of the native format: transformers' `deepseek_vl` and `deepseek_vl_hybrid`.

Transformers 4.57 and 5.x both read what is written here. Source: transformers 4.57.6, `models/deepseek_vl*`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavl.config.model import ModelConfig, SamConfig, SiglipConfig
from megavl.config.presets import CLIP_MEAN, CLIP_STD, HALF
from megavl.convert.adaptors import NATIVE_DEPTH, NATIVE_KINDS
from megavl.convert.language import Fields, eos_json, language_json, model_config, read_language, renamed, system_json
from megavl.convert.tokenizer_files import TokenizerIds

MODEL_TYPES = ("deepseek_vl", "deepseek_vl_hybrid")
_BILINEAR, _BICUBIC = 2, 3
_MIN_SIDE = 14

SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
"""Defaults of transformers' `SiglipVisionConfig`."""
SAM_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "output_channels": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 1024,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4.0,
    "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11],
}
"""Defaults of transformers' `SamVisionConfig`."""

_SIGLIP_NAMES = {
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
_SAM_NAMES = {name: theirs for name, theirs in _SIGLIP_NAMES.items() if name != "mlp_dim"} | {
    "window_size": "window_size",
    "neck_channels": "output_channels",
}
"""Names of the sizes in MegaVL's and in transformers' configurations. SAM's MLP width is a special case."""


def read_config(raw: dict[str, Any], *, where: Path) -> ModelConfig:
    """Sizes from a native `config.json`; absent fields get the defaults of transformers.

    Raises:
        CheckpointError: names the field that MegaVL cannot represent.
    """
    top = Fields(raw, where=where, path="", defaults={"image_token_id": 100015})
    hybrid = raw["model_type"] == "deepseek_vl_hybrid"
    vision = top.child("vision_config", defaults=SIGLIP_DEFAULTS)
    if vision.get("hidden_act") != "gelu":
        raise vision.error(
            "hidden_act",
            f"MegaVL runs SigLIP with the exact 'gelu', found {vision.get('hidden_act')!r} (the default where the "
            "field is absent); DeepSeek-VL was trained with 'gelu', set it if this is a DeepSeek-VL model",
        )
    sizes: dict[str, Any] = {
        "llm": read_language(top, "text_config"),
        "siglip": read_siglip(vision),
        "adaptor": {"kind": NATIVE_KINDS[hybrid], "depth": NATIVE_DEPTH},
        "image_token_id": top.get("image_token_id"),
    }
    if hybrid:
        sizes["sam"] = read_sam(top.child("high_res_vision_config", defaults=SAM_DEFAULTS))
    return model_config(sizes, where=where)


def read_siglip(fields: Fields) -> dict[str, Any]:
    """Fields of `SiglipConfig` from a `SiglipVisionConfig` object; its activation is ignored."""
    fields.require("model_type", "siglip_vision_model")
    fields.require("num_channels", 3)
    return {**fields.integers(_SIGLIP_NAMES), "layer_norm_eps": fields.number("layer_norm_eps")}


def read_sam(fields: Fields) -> dict[str, Any]:
    """Fields of `SamConfig` from a `SamVisionConfig` object."""
    fixed = {"model_type": "sam_vision_model", "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True}
    for name, value in {**fixed, "use_abs_pos": True, "use_rel_pos": True}.items():
        fields.require(name, value)
    sizes = fields.integers(_SAM_NAMES)
    # transformers ignores intermediate_size here and takes mlp_dim, else mlp_ratio.
    has_mlp_dim = fields.get("mlp_dim") is not None
    return {
        **sizes,
        "mlp_dim": fields.integer("mlp_dim") if has_mlp_dim else int(sizes["width"] * fields.number("mlp_ratio")),
        "global_attn_indexes": fields.get("global_attn_indexes"),
        "layer_norm_eps": fields.number("layer_norm_eps"),
    }


def side_files(config: ModelConfig, *, ids: TokenizerIds, dtype: str) -> dict[str, dict[str, Any]]:
    """JSON files of an export by file name, without those of the tokenizer.

    Args:
        config: sizes, with an adaptor that the format holds (`adaptors.require_holdable`).
        dtype: name of the weights' type, such as `bfloat16`.
    """
    hybrid, eos = config.sam is not None, eos_json(config, eos_id=ids.eos)
    stem = "DeepseekVLHybrid" if hybrid else "DeepseekVL"
    model: dict[str, Any] = {
        "architectures": [f"{stem}ForConditionalGeneration"],
        "model_type": "deepseek_vl_hybrid" if hybrid else "deepseek_vl",
        "image_token_id": config.image_token_id,
        **system_json(config),
        # Both levels: the top-level default is true, and a loader that trusts it would tie the two matrices.
        "tie_word_embeddings": False,
        "text_config": language_json(config.llm, bos_id=ids.bos, eos_id=eos, dtype=dtype),
        "vision_config": _siglip_json(config.siglip, dtype),
        "torch_dtype": dtype,
    }
    if config.sam is not None:
        model["high_res_vision_config"] = _sam_json(config.sam, dtype)
    return {
        "config.json": model,
        "generation_config.json": {
            "bos_token_id": ids.bos,
            "eos_token_id": eos,
            "pad_token_id": ids.pad,
        },
        "preprocessor_config.json": _image_processor_json(config, stem),
        "processor_config.json": {"processor_class": f"{stem}Processor", "num_image_tokens": config.image_tokens},
    }


def _siglip_json(tower: SiglipConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        **renamed(tower, _SIGLIP_NAMES),
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": tower.layer_norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "torch_dtype": dtype,
    }


def _sam_json(tower: SamConfig, dtype: str) -> dict[str, Any]:
    return {
        "model_type": "sam_vision_model",
        **renamed(tower, _SAM_NAMES),
        "mlp_dim": tower.mlp_dim,
        "mlp_ratio": tower.mlp_dim / tower.width,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": tower.layer_norm_eps,
        "attention_dropout": 0.0,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "global_attn_indexes": list(tower.global_attn_indexes),
        "num_pos_feats": tower.neck_channels // 2,
        "torch_dtype": dtype,
    }


def _image_processor_json(config: ModelConfig, stem: str) -> dict[str, Any]:
    side = config.siglip.image_size
    processor: dict[str, Any] = {
        # transformers 4.57 takes the slow classes unless told otherwise. With one tower these are exact; with two they
        # pad with the wrong tower's colour, so the fast class is named (without torchvision it is the slow one still).
        "image_processor_type": f"{stem}ImageProcessor" + ("" if config.sam is None else "Fast"),
        "processor_class": f"{stem}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "min_size": _MIN_SIDE,
        "size": {"height": side, "width": side},
        "resample": _BICUBIC,
        "image_mean": list(HALF),
        "image_std": list(HALF),
    }
    if config.sam is None:
        return processor
    high = config.sam.image_size
    return processor | {
        # The low-resolution image is made from the padded high-resolution one, with the bilinear filter.
        "resample": _BILINEAR,
        "high_res_size": {"height": high, "width": high},
        "high_res_resample": _BICUBIC,
        "high_res_image_mean": list(CLIP_MEAN),
        "high_res_image_std": list(CLIP_STD),
    }
