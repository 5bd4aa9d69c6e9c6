"""Names: a parameter of the one-rank model (flat) against the key it is stored under.

megatron-core stacks the decoder layers under one key with the layer as first axis, names the two norms of a layer after
the projections that follow them, and keeps an empty `_extra_state` object beside each parallel projection of a layer.
L = decoder layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "model."
"""Every key of the model starts with this; those of the optimizer do not."""
LAYERS = "language_model.decoder.layers."

_FLAT_LAYER = re.compile(re.escape(LAYERS) + r"(\d+)\.(.+)")
_STORED_LAYER = re.compile(re.escape(PREFIX + LAYERS) + r"(?!\d+\.)(.+)")
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_NORMS_BACK = {stored: flat for flat, stored in _NORMS.items()}
_PROJECTIONS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class Place:
    """Where a flat tensor is stored."""

    key: str
    layer: int | None
    """Index on the first axis of the stored tensor; None for a tensor that is stored as it is."""


def place_of(flat: str) -> Place:
    """Place of a flat name, e.g. `language_model.decoder.layers.2.input_layernorm.weight`."""
    match = _FLAT_LAYER.fullmatch(flat)
    if not match:
        return Place(PREFIX + flat, None)
    return Place(PREFIX + LAYERS + _NORMS.get(match[2], match[2]), int(match[1]))


def flat_names(key: str, *, layers: int) -> list[str]:
    """Flat names of a stored tensor key: one for each of `layers` entries of a stacked key, else exactly one.

    `key` starts with `PREFIX`; `layers` is the size of the first axis and ignored for keys that are not stacked.
    """
    match = _STORED_LAYER.fullmatch(key)
    if not match:
        return [key.removeprefix(PREFIX)]
    return [f"{LAYERS}{layer}.{_NORMS_BACK.get(match[1], match[1])}" for layer in range(layers)]


def is_stacked(key: str) -> bool:
    """Whether a stored key holds all decoder layers along its first axis."""
    return _STORED_LAYER.fullmatch(key) is not None


def extra_state_keys(*, layers: int) -> list[str]:
    """Keys of the empty objects that a model of L = `layers` decoder layers expects beside its weights."""
    return [
        f"{PREFIX}{LAYERS}{projection}._extra_state/shard_{layer}_{layers}"
        for projection in _PROJECTIONS
        for layer in range(layers)
    ]


def language_model_names(*, layers: int) -> list[str]:
    """Flat names of a complete language model of L = `layers` decoder layers."""
    parts = [*_NORMS, *(f"{projection}.weight" for projection in _PROJECTIONS)]
    return [
        "language_model.embedding.word_embeddings.weight",
        *(f"{LAYERS}{layer}.{part}" for layer in range(layers) for part in parts),
        "language_model.decoder.final_layernorm.weight",
        "language_model.output_layer.weight",
    ]
