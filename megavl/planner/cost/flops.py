"""Model FLOPs of a training step: one formula for the plan and for the reported MFU.

A trained language model costs 6 x (body + head) + 6 x L x S x d FLOPs per token. Body and head are their matrix
parameters; attention counts causally, as half of the full square. Encoders and adaptor cost their forward pass, plus
the backward pass of what trains. Frozen weights take no weight gradient, and no input gradient if nothing before them
trains.

MFU leaves out what the implementation does beyond the model: activation recompute, encoders repeated on tensor-parallel
ranks, the dummy image of a text-only step, and `Block.overhead`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from megavl.config.model import ModelConfig
from megavl.planner.cost.blocks import Block, decoder_layer_blocks, head_block, vision_blocks
from megavl.planner.scenario import Kind, Scenario

MFU_CONVENTION = (
    "MFU: model FLOPs over the vendor's dense peak; 6 x (body + head) + 6 x L x S x d per trained token (causal), "
    "with a label or without; encoders as they run; recompute, repeated encoders and padding count as time only"
)
"""Printed wherever MFU is."""


def active_parts(trainable_parts: Collection[str], *, images: int) -> frozenset[str]:
    """Trained parts that take part in a step: without images, only the language model."""
    return frozenset(trainable_parts) if images else frozenset(trainable_parts) & {"llm"}


def train_flops(blocks: Iterable[Block], *, trainable: frozenset[str]) -> int:
    """Forward and backward FLOPs of `blocks`."""
    return sum(block.forward + block.backward(trainable) for block in blocks)


def step_flops(
    model: ModelConfig,
    *,
    seq_length: int,
    sequences: int,
    images: int,
    trainable_parts: Collection[str],
) -> int:
    """Model FLOPs of one optimizer step over all ranks.

    Args:
        seq_length: tokens per sequence S.
        sequences: sequences of the step (global batch).
        images: images of the step; 0 on a text-only step.
        trainable_parts: rows of `TRAINABLE_PARTS` that train.
    """
    trainable = active_parts(trainable_parts, images=images)
    tokens = seq_length * sequences
    layer = decoder_layer_blocks(model.llm, tokens=tokens, seq_length=seq_length)
    decoder = model.llm.num_layers * train_flops(layer, trainable=trainable)
    head = train_flops([head_block(model.llm, tokens=tokens)], trainable=trainable)
    vision = images * train_flops(vision_blocks(model), trainable=trainable)
    return decoder + head + vision


def mfu(flops: float, *, seconds: float, devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0 to 1: model FLOPs of a step over what `devices` could do in its `seconds`."""
    return flops / (seconds * devices * peak_flops)


def model_flops(scenario: Scenario, kind: Kind) -> int:
    """`step_flops` of one kind of step."""
    recipe, batch = scenario.recipe, scenario.recipe.training.global_batch_size
    return step_flops(
        recipe.model,
        seq_length=recipe.data.seq_length,
        sequences=batch,
        images=round(scenario.images * batch) if kind == "multimodal" else 0,
        trainable_parts=recipe.trainable_parts,
    )
