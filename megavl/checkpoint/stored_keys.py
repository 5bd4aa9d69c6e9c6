"""The key under which a checkpoint stores a parameter.

megatron-core stacks the decoder layers under one key, with the layer as first axis. The two norms of a layer are named
after the projections that follow them. Each projection of a layer has an empty `_extra_state` object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megavl.weights.canonical_names import FUSED_NORMS, LAYERS

PREFIX = "model."
"""Every key of the model starts with this; those of the optimizer do not."""

_LAYER = re.compile(re.escape(LAYERS) + r"(\d+)\.(.+)")
_STACKED = re.compile(re.escape(PREFIX + LAYERS) + r"(?!\d+\.)(.+)")
_FUSED = {canonical: fused for fused, canonical in FUSED_NORMS.items()}
_PROJECTIONS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class StoredKey:
    """Key of a parameter, and its index in a stacked tensor."""

    key: str
    layer: int | None
    """Index on the first axis of the stored tensor; None for a tensor that is not stacked."""


def stored_key(name: str) -> StoredKey:
    """Stored key of a canonical name, e.g. `language_model.decoder.layers.2.input_layernorm.weight`."""
    match = _LAYER.fullmatch(name)
    if not match:
        return StoredKey(PREFIX + name, None)
    return StoredKey(PREFIX + LAYERS + _FUSED.get(match[2], match[2]), int(match[1]))


def canonical_names(key: str, *, layers: int) -> list[str]:
    """Canonical names of the parameters in a stored tensor: one for each layer of a stacked key, else exactly one.

    Args:
        key: starts with `PREFIX`.
        layers: size of the first axis; ignored for a key that is not stacked.
    """
    match = _STACKED.fullmatch(key)
    if not match:
        return [key.removeprefix(PREFIX)]
    return [f"{LAYERS}{layer}.{FUSED_NORMS.get(match[1], match[1])}" for layer in range(layers)]


def is_stacked(key: str) -> bool:
    """Whether a stored key holds all decoder layers along its first axis."""
    return _STACKED.fullmatch(key) is not None


def extra_state_keys(*, layers: int) -> list[str]:
    """Keys of the empty objects that a model of `layers` decoder layers expects besides its weights."""
    return [
        f"{PREFIX}{LAYERS}{projection}._extra_state/shard_{layer}_{layers}"
        for projection in _PROJECTIONS
        for layer in range(layers)
    ]
