"""Configuration files of the decoder alone: transformers' `LlamaForCausalLM`, which clients of language models open.

Text gets the ids and logits that the whole model gives it. The towers and the adaptor are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavl.config.model import ModelConfig
from megavl.config.presets import MODELS
from megavl.convert.language import eos_json, language_json, model_config, read_llama, system_json
from megavl.convert.tokenizer_files import TokenizerIds, image_token_id

MODEL_TYPE = "llama"
_TOWERS = "tiny-siglip"


def read_config(raw: dict[str, Any], *, where: Path) -> ModelConfig:
    """Sizes from the `config.json` of a decoder alone, with the smallest towers, which text never reaches.

    Raises:
        CheckpointError: names the field that MegaVL cannot represent.
        DataError: the tokenizer beside the file has no image token.
    """
    sizes = {**MODELS[_TOWERS], "llm": read_llama(raw, where=where), "image_token_id": image_token_id(where.parent)}
    return model_config(sizes, where=where)


def side_files(config: ModelConfig, *, ids: TokenizerIds, dtype: str) -> dict[str, dict[str, Any]]:
    """As `native_format.side_files`."""
    eos = eos_json(config, eos_id=ids.eos)
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            **language_json(config.llm, bos_id=ids.bos, eos_id=eos, dtype=dtype),
            **system_json(config),
        },
        "generation_config.json": {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad},
    }
