"""What two configurations differ in: settings that no tensor's shape shows are compared by name and value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megavl.config.load import load_model_config, to_dict
from megavl.config.model import ModelConfig
from megavl.config.presets import CUSTOM, MODELS

MODEL_LABELS = ("preset", "llm.max_position_embeddings", "llm.init_std", "eos_token_ids", "system_prompt")
"""Fields of a model that change no number it computes: a name, a limit that exports state, the spread of random initial
weights, where answers end, and what begins a prompt. Every other field must be equal, also one that is new."""
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that has two values."""

    key: str
    """Dotted path, as in a recipe."""
    old: Any
    """None where it is not stated."""
    new: Any


def changes(old: Mapping[str, Any], new: Mapping[str, Any], *, at: str = "") -> Iterator[Change]:
    """Every value that differs in two nested mappings of plain values, such as two resolved recipes.

    Args:
        at: dotted path of the mappings, with a dot at its end.
    """
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from changes(before, after, at=f"{at}{key}.")
        elif before != after:
            yield Change(key=f"{at}{key}", old=before, new=after)


def model_changes(old: ModelConfig, new: ModelConfig) -> tuple[list[Change], list[Change]]:
    """Differences of two models: those that make it another model, and those in `MODEL_LABELS`."""
    found = list(changes(to_dict(old), to_dict(new), at="model."))
    labels = [change for change in found if change.key.removeprefix("model.") in MODEL_LABELS]
    return [change for change in found if change not in labels], labels


def with_own_preset(config: ModelConfig) -> ModelConfig:
    """The same sizes, with the name of the preset that has exactly these, or `custom`."""
    named = (load_model_config(name, system_prompt=config.system_prompt) for name in MODELS)
    return next((row for row in named if row == dataclasses.replace(config, preset=row.preset)), _custom(config))


def model_name(config: ModelConfig) -> str:
    """Name for people: the preset, with what was changed in it."""
    if config.preset not in MODELS:
        return config.preset
    found = [
        f"{change.key} {change.new}"
        for change in changes(to_dict(load_model_config(config.preset)), to_dict(config))
        if change.key != "system_prompt"
    ]
    more = [f"{len(found) - _SHOWN} more changes"] if len(found) > _SHOWN else []
    return f"{config.preset} with {', '.join([*found[:_SHOWN], *more])}" if found else config.preset


def _custom(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, preset=CUSTOM)
