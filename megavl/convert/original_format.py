"""Configuration files of the original format: the deepseek-ai release (`model_type: multi_modality`).

The released client looks tower sizes up by `model_name`. Towers of other sizes are written under a name that it does
not know, with their sizes next to it. So the client stops instead of building the wrong tower.
Source: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/models/{clip_encoder,siglip_vit,sam,projector}.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megavl.config.bounds import MAX_LAYERS
from megavl.config.chat import IMAGE_TOKEN
from megavl.config.model import ModelConfig, SamConfig, SiglipConfig
from megavl.config.presets import CLIP_MEAN, CLIP_STD, HALF, MODELS
from megavl.convert.adaptors import ORIGINAL, original_params, read_original
from megavl.convert.language import Fields, eos_json, language_json, model_config, read_language, renamed, system_json
from megavl.convert.tokenizer_files import TokenizerIds, image_token_id

MODEL_TYPE = "multi_modality"
_MIN_SIDE = 14

_SIGLIP_NAME, _SAM_NAME = "siglip_large_patch16_384", "sam_b_downsample"
_SIGLIP, _SAM = SiglipConfig(**MODELS["7b"]["siglip"]), SamConfig(**MODELS["7b"]["sam"])
"""Sizes of the towers that the released client knows by these names."""
_STATED = {name: name for name in ("patch_size", "width", "heads", "mlp_dim")}
_STATED_SAM = {"depth": "layers", "window_size": "window_size", "neck_channels": "prompt_embed_dim"}
"""Sizes that the file states for a tower of another name, with their names there."""
_EPS = 1e-6


def read_config(raw: dict[str, Any], *, where: Path) -> ModelConfig:
    """Sizes from an original `config.json`; absent fields get the defaults of the released classes.

    The image token's id comes from the tokenizer in the same folder.

    Raises:
        CheckpointError: names the field that MegaVL cannot represent.
        DataError: the tokenizer has no image token.
    """
    top = Fields(raw, where=where, path="", defaults={})
    vision = top.child("vision_config", defaults={})
    tower_defaults = {"model_name": _SIGLIP_NAME, "image_size": 336, "select_layer": -2, "layer_norm_eps": _EPS}
    params = vision.child("params", defaults={**tower_defaults, "concat_type": "tuple"})
    hybrid = vision.get("cls") == "HybridVisionTower"
    if not hybrid and vision.get("cls") != "CLIPVisionTower":
        raise vision.error("cls", f"expected HybridVisionTower or CLIPVisionTower, found {vision.get('cls')!r}")
    sizes: dict[str, Any] = {"llm": read_language(top, "language_config")}
    concat_type = None
    if hybrid:
        concat_type = params.get("concat_type")
        if concat_type not in ("tuple", "feature"):
            raise params.error("concat_type", f"MegaVL joins towers as 'tuple' or 'feature', found {concat_type!r}")
        sizes["sam"] = _read_sam(params.child("high_res_cfg", defaults=tower_defaults))
        sizes["siglip"] = _read_siglip(params.child("low_res_cfg", defaults=tower_defaults))
    else:
        sizes["siglip"] = _read_siglip(params)
    aligner = top.child("aligner_config", defaults={})
    aligner.require("cls", "MlpProjector")
    sizes["adaptor"] = read_original(
        aligner.child("params", defaults={"depth": 1}), concat_type=concat_type, sizes=sizes
    )
    sizes["image_token_id"] = image_token_id(where.parent)
    return model_config(sizes, where=where)


def _read_siglip(fields: Fields) -> dict[str, Any]:
    if fields.get("width") is not None:
        tower, layers = _stated_sizes(fields), fields.integer("layers", limit=MAX_LAYERS)
    elif fields.get("model_name") == _SIGLIP_NAME:
        tower, layers = dataclasses.asdict(_SIGLIP), _SIGLIP.depth
    else:
        raise fields.error("model_name", f"expected {_SIGLIP_NAME}, found {fields.get('model_name')!r}")
    select = fields.get("select_layer")
    if isinstance(select, bool) or not isinstance(select, int):
        raise fields.error("select_layer", f"a whole number is expected, found {select!r}")
    depth = min(layers, select if select > 0 else layers + select + 1)
    if depth < 1:
        raise fields.error("select_layer", f"{select} leaves no block of {layers}")
    return {**tower, "depth": depth, "image_size": fields.integer("image_size")}


def _read_sam(fields: Fields) -> dict[str, Any]:
    if fields.get("width") is None:
        if fields.get("model_name") != _SAM_NAME:
            raise fields.error("model_name", f"expected {_SAM_NAME}, found {fields.get('model_name')!r}")
        return {**dataclasses.asdict(_SAM), "image_size": fields.integer("image_size")}
    return {
        **_stated_sizes(fields),
        "image_size": fields.integer("image_size"),
        **fields.integers(_STATED_SAM),
        "global_attn_indexes": fields.get("global_attn_indexes"),
    }


def _stated_sizes(fields: Fields) -> dict[str, Any]:
    return {**fields.integers(_STATED), "layer_norm_eps": fields.number("layer_norm_eps")}


def side_files(config: ModelConfig, *, ids: TokenizerIds, dtype: str) -> dict[str, dict[str, Any]]:
    """As `native_format.side_files`."""
    hybrid, eos = config.sam is not None, eos_json(config, eos_id=ids.eos)
    mean, std = (CLIP_MEAN, CLIP_STD) if hybrid else (HALF, HALF)
    return {
        "config.json": {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": MODEL_TYPE,
            "vision_config": {
                "model_type": "vision",
                "cls": "HybridVisionTower" if hybrid else "CLIPVisionTower",
                "params": _vision_params(config),
            },
            "aligner_config": {"model_type": "aligner", "cls": "MlpProjector", "params": original_params(config)},
            "language_config": language_json(config.llm, bos_id=ids.bos, eos_id=eos, dtype=dtype),
            "tie_word_embeddings": False,
            **system_json(config),
            "torch_dtype": dtype,
        },
        "preprocessor_config.json": {
            "image_processor_type": "VLMImageProcessor",
            "processor_class": "VLChatProcessor",
            "image_size": config.canvas_size,
            "min_size": _MIN_SIDE,
            "image_mean": list(mean),
            "image_std": list(std),
            "background_color": [int(255 * value) for value in mean],
            # The hybrid towers normalise their own input.
            "do_normalize": not hybrid,
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": IMAGE_TOKEN,
            "num_image_tokens": config.image_tokens,
            "add_special_token": False,
            "sft_format": "deepseek",
            "mask_prompt": True,
            "ignore_id": -100,
        },
    }


def _vision_params(config: ModelConfig) -> dict[str, Any]:
    low = _siglip_params(config.siglip)
    if config.sam is None:
        return low
    tower = {"ckpt_path": "", "output_dim": config.siglip.width}
    return {
        "concat_type": ORIGINAL[config.adaptor.kind].concat_type,
        "high_res_cfg": {
            **_sam_params(config.sam),
            **tower,
            "pixel_mean": list(CLIP_MEAN),
            "pixel_std": list(CLIP_STD),
        },
        "low_res_cfg": {**low, **tower, "pixel_mean": list(HALF), "pixel_std": list(HALF)},
    }


def _siglip_params(tower: SiglipConfig) -> dict[str, Any]:
    params = {"image_size": tower.image_size, "select_feature": "same"}
    comparable = dataclasses.replace(tower, image_size=_SIGLIP.image_size, depth=_SIGLIP.depth)
    if comparable == _SIGLIP and tower.depth <= _SIGLIP.depth:
        return params | {"model_name": _SIGLIP_NAME, "select_layer": tower.depth - _SIGLIP.depth - 1}
    name = f"siglip_w{tower.width}_d{tower.depth}_patch{tower.patch_size}_{tower.image_size}"
    return params | {"model_name": name, "select_layer": -1, "layers": tower.depth} | _size_params(tower)


def _sam_params(tower: SamConfig) -> dict[str, Any]:
    params = {"image_size": tower.image_size, "select_feature": "same", "select_layer": -1}
    if tower == _SAM:
        return params | {"model_name": _SAM_NAME}
    return {
        **params,
        **_size_params(tower),
        **renamed(tower, _STATED_SAM),
        "model_name": f"sam_w{tower.width}_d{tower.depth}_downsample",
        "global_attn_indexes": list(tower.global_attn_indexes),
        "downsample_channels": [2 * tower.neck_channels, 4 * tower.neck_channels],
    }


def _size_params(tower: SiglipConfig | SamConfig) -> dict[str, Any]:
    return {**renamed(tower, _STATED), "layer_norm_eps": tower.layer_norm_eps}
