"""The language model's fields of a `config.json`, the same in both formats: transformers' `LlamaConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.config.bounds import MAX_LAYERS, MAX_SIZE
from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import CheckpointError, UsageError
from megavl.config.identity import with_own_preset
from megavl.config.load import model_config_from_dict
from megavl.config.model import DecoderConfig, ModelConfig
from megavl.config.presets import CUSTOM

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}
"""Defaults of `LlamaConfig` in transformers 4.38 to 5.23; the published 7B file leaves most fields out."""

_NAMES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
"""Names of the sizes in `DecoderConfig` and in `LlamaConfig`."""
_FIXED: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""Fields for which MegaVL supports one value only; absent means this value."""


class Fields:
    """One JSON object of a configuration, read field by field with defaults and errors that name the field."""

    def __init__(self, raw: Any, *, where: Path, path: str, defaults: Mapping[str, Any]) -> None:
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: {path}: a JSON object is expected, found {raw!r}")
        self._raw, self._where, self._path, self._defaults = raw, where, path, defaults

    def error(self, name: str, message: str) -> CheckpointError:
        """An error about one field."""
        return CheckpointError(f"{self._where}: {self._path}{'.' if self._path else ''}{name}: {message}")

    def get(self, name: str) -> Any:
        """Value of a field; null and absent mean the default."""
        value = self._raw.get(name)
        return self._defaults.get(name) if value is None else value

    def integer(self, name: str, *, limit: int = MAX_SIZE) -> int:
        """A whole number from 1 to `limit`; a larger one is no model but would fill the memory."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise self.error(name, f"a whole number from 1 to {limit} is expected, found {value!r}")
        return value

    def integers(self, names: Mapping[str, str]) -> dict[str, int]:
        """Several whole numbers by MegaVL's names; `names` gives the name of each in the file."""
        return {
            ours: self.integer(theirs, limit=MAX_LAYERS if ours in ("depth", "num_layers") else MAX_SIZE)
            for ours, theirs in names.items()
        }

    def number(self, name: str) -> float:
        """A positive number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.error(name, f"a positive number is expected, found {value!r}")
        return float(value)

    def require(self, name: str, allowed: Any) -> None:
        """Refuse every value but one; absent and null pass."""
        value = self._raw.get(name)
        if value is not None and value != allowed:
            raise self.error(name, f"MegaVL has {allowed!r} only, found {value!r}; this model cannot be represented")

    def child(self, name: str, *, defaults: Mapping[str, Any]) -> Fields:
        """A nested object; absent means an empty one."""
        raw = self._raw.get(name)
        path = f"{self._path}.{name}" if self._path else name
        return Fields({} if raw is None else raw, where=self._where, path=path, defaults=defaults)


def read_language(parent: Fields, name: str) -> dict[str, Any]:
    """Fields of `DecoderConfig` from a `LlamaConfig` object; absent fields get its defaults.

    Raises:
        CheckpointError: grouped-query attention, biases, rotary scaling or another feature that MegaVL lacks.
    """
    return _sizes_of(parent.child(name, defaults=_DEFAULTS))


def read_llama(raw: dict[str, Any], *, where: Path) -> dict[str, Any]:
    """Fields of `DecoderConfig` from the `config.json` of a language model alone.

    Raises:
        CheckpointError: as in `read_language`.
    """
    return _sizes_of(Fields(raw, where=where, path="", defaults=_DEFAULTS))


def ties_head(fields: Fields) -> bool:
    """Whether a `LlamaConfig` object makes embedding and head one matrix; absent means no."""
    tied = fields.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise fields.error("tie_word_embeddings", f"true or false is expected, found {tied!r}")
    return bool(tied)


def _sizes_of(fields: Fields) -> dict[str, Any]:
    for key, value in _FIXED.items():
        fields.require(key, value)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    fields.require("num_key_value_heads", heads)
    if hidden % heads == 0:
        fields.require("head_dim", hidden // heads)
    return {
        **fields.integers(_NAMES),
        "rope_theta": _rope_theta(fields),
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "init_std": fields.number("initializer_range"),
    }


def eos_json(config: ModelConfig, *, eos_id: int) -> int | list[int]:
    """`eos_token_id` of an export: the model's ids where it has several, else the tokenizer's."""
    return list(config.eos_token_ids) or eos_id


def system_json(config: ModelConfig) -> dict[str, str]:
    """What an export says about the model's system text; nothing where it is that of the released models."""
    return {} if config.system_prompt == SYSTEM_PROMPT else {"system_prompt": config.system_prompt}


def language_json(llm: DecoderConfig, *, bos_id: int, eos_id: int | list[int], dtype: str) -> dict[str, Any]:
    """The `LlamaConfig` object of an export, every field written out.

    `pad_token_id` stays null: padding is the EOS token, and naming it here would freeze EOS's embedding
    (`padding_idx`) in whatever trains the export further.
    """
    return {
        **_FIXED,
        **renamed(llm, _NAMES),
        "num_key_value_heads": llm.num_attention_heads,
        "head_dim": llm.head_dim,
        # transformers 4 ignores the newer rope_parameters; every version reads these two.
        "rope_theta": llm.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": llm.rms_norm_eps,
        "initializer_range": llm.init_std,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def renamed(config: object, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a configuration by their names in a file; `names` maps MegaVL's names to these."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def model_config(raw: dict[str, Any], *, where: Path) -> ModelConfig:
    """A checked `ModelConfig`, with the preset that has exactly these sizes.

    Raises:
        CheckpointError: sizes that do not fit together.
    """
    try:
        return with_own_preset(model_config_from_dict({**raw, "preset": CUSTOM}, source=str(where)))
    except UsageError as error:
        raise CheckpointError(str(error)) from error


def _rope_theta(fields: Fields) -> float:
    # transformers 5 writes rope_parameters; its default type is the plain rotary embedding.
    newer = fields.child("rope_parameters", defaults={"rope_type": "default"})
    scaling = fields.child("rope_scaling", defaults={})
    newer.require("rope_type", "default")
    for key in ("rope_type", "type"):
        scaling.require(key, "default")
    return newer.number("rope_theta") if newer.get("rope_theta") is not None else fields.number("rope_theta")
