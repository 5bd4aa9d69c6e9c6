"""Decoder layers per pipeline stage, and megatron-core's notation for them."""

from __future__ import annotations

from collections.abc import Sequence

from megavl.config.model import ModelConfig
from megavl.planner.cost.blocks import decoder_layer_blocks, embedding_block, head_block, vision_blocks
from megavl.planner.layouts.balance import balance
from megavl.planner.scenario import Scenario
from megavl.planner.simulation.times import TimeSource


def layout_of(scenario: Scenario, source: TimeSource, *, memory_bytes: int | None = None) -> tuple[int, ...]:
    """Decoder layers per stage: `parallel.layout`, or the balanced split if it is `auto`."""
    layout = scenario.recipe.parallel.layout
    if layout == "auto":
        return balance(scenario, source, memory_bytes=memory_bytes)
    return layout


def balance_weights(model: ModelConfig, *, stages: int, tensor: int = 1) -> tuple[int, ...]:
    """Decoder layers per pipeline stage for inference: the fullest rank holds as few weights as possible.

    A token passes the stages one after the other, so an even split is no faster; but each stage must fit its device.

    Args:
        tensor: tensor-parallel ranks, over which everything but the encoders is divided.
    """
    layer = sum(block.parameters for block in decoder_layer_blocks(model.llm)) / tensor
    held = [0.0] * stages
    held[0] += sum(block.parameters for block in vision_blocks(model)) + embedding_block(model.llm).parameters / tensor
    held[-1] += head_block(model.llm).parameters / tensor
    layers = [0] * stages
    # All layers have the same size, so the emptiest stage takes each one; of equal stages, the later.
    for _ in range(model.llm.num_layers):
        emptiest = min(reversed(range(stages)), key=held.__getitem__)
        held[emptiest] += layer
        layers[emptiest] += 1
    return tuple(layers)


def layout_string(layers_per_stage: Sequence[int]) -> str | None:
    """megatron-core's `pipeline_model_parallel_layout`, e.g. `Et*6|t*8|t*8|t*8L`.

    None for one stage: megatron-core would read the parts of its string as virtual stages.
    """
    if len(layers_per_stage) == 1:
        return None
    stages = [f"t*{layers}" if layers else "" for layers in layers_per_stage]
    return f"E{'|'.join(stages)}L"
