"""Two configurations are compared field by field; a new field cannot be forgotten."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from megavl.config.identity import MODEL_LABELS, changes, model_changes, model_name
from megavl.config.load import load_model_config

MODEL = load_model_config("tiny-hybrid")


def leaves(config: Any, at: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from leaves(value, f"{at}{field.name}.") if dataclasses.is_dataclass(value) else [f"{at}{field.name}"]


def altered(config: Any, key: str) -> Any:
    """A copy with another value in one field, without the checks that would refuse it."""
    first, _, rest = key.partition(".")
    other, old = copy.copy(config), getattr(config, first)
    new = altered(old, rest) if rest else _other(old)
    object.__setattr__(other, first, new)
    return other


def _other(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*value, 9)
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("key", [*leaves(MODEL)])
def test_every_field_of_a_model_is_compared(key: str) -> None:
    conflicts, labels = model_changes(MODEL, altered(MODEL, key))
    assert [change.key for change in conflicts + labels] == [f"model.{key}"]
    assert bool(labels) == (key in MODEL_LABELS)


def test_labels_are_fields() -> None:
    assert set(MODEL_LABELS) <= set(leaves(MODEL))


def test_a_missing_tower_is_a_difference() -> None:
    (change,) = changes({"sam": {"heads": 2}}, {"sam": None})
    assert (change.key, change.old, change.new) == ("sam", {"heads": 2}, None)
    assert model_changes(MODEL, load_model_config("tiny-siglip"))[0]


def test_names_say_what_was_changed() -> None:
    assert model_name(MODEL) == "tiny-hybrid"
    changed = load_model_config("tiny-hybrid", llm={"rope_theta": 5e5, "num_attention_heads": 8})
    assert model_name(changed) == "tiny-hybrid with llm.num_attention_heads 8, llm.rope_theta 500000.0"
