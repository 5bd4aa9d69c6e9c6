"""Canonical names of parameters on a pipeline stage and under Transformer Engine."""

from __future__ import annotations

import math

from megavl.config.load import load_model_config
from megavl.weights.canonical_names import canonical_name, canonical_shapes

LAYER = "language_model.decoder.layers.3"


def test_fused_norms_get_their_own_name() -> None:
    fused = f"{LAYER}.self_attention.linear_qkv.layer_norm_weight"
    assert canonical_name(fused) == f"{LAYER}.input_layernorm.weight"
    assert canonical_name(f"{LAYER}.mlp.linear_fc1.layer_norm_weight") == f"{LAYER}.pre_mlp_layernorm.weight"


def test_layers_of_later_stages_count_on() -> None:
    name = "language_model.decoder.layers.1.mlp.linear_fc2.weight"
    assert canonical_name(name, first_layer=3) == "language_model.decoder.layers.4.mlp.linear_fc2.weight"
    fused = "language_model.decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert canonical_name(fused, first_layer=3) == f"{LAYER}.pre_mlp_layernorm.weight"
    for name in ("language_model.output_layer.weight", "vision.siglip.blocks.1.norm1.weight"):
        assert canonical_name(name, first_layer=3) == name


def test_released_sizes_have_their_parameters() -> None:
    for preset, parameters in (("1b", 1_962_640_384), ("7b", 7_331_390_721)):
        shapes = canonical_shapes(load_model_config(preset))
        assert sum(map(math.prod, shapes.values())) == parameters
        assert all(canonical_name(name) == name for name in shapes)
