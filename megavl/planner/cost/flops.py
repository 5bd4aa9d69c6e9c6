"""FLOPs of a training step: one formula for the plan and for the reported MFU.

Convention, "counted causally": a trained language model costs 6 x (body + head) + 6 x L x S x d FLOPs per token, body
and head being their matrix parameters and the attention half of the full square; the encoders and the adaptor cost
their forward pass, plus the backward pass of what trains. Frozen weights take no weight gradient, and no input
gradient where nothing below them trains. What is done twice or for the sake of the implementation (activation
recompute, encoders repeated on tensor-parallel ranks, the stand-in image of a text-only step, `Block.overhead`) is
never part of MFU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from megavl.config.model import ModelConfig
from megavl.config.recipe import TRAINABLE_PARTS, RecomputeConfig
from megavl.planner.cost.blocks import Block, decoder_layer_blocks, embedding_block, head_block, vision_blocks

MFU_CONVENTION = (
    "MFU: useful FLOPs over the vendor's dense peak; 6 x (body + head) + 6 x L x S x d per trained token (causal), "
    "with a label or without; encoders as they run; recompute, repeated encoders and padding count as time only"
)
"""Printed wherever MFU is."""


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters of each row of `TRAINABLE_PARTS`; rows that the model lacks hold 0."""
    llm = model.llm
    layer = decoder_layer_blocks(llm, tokens=0, attention_span=0)
    counts = dict.fromkeys(TRAINABLE_PARTS, 0)
    for block in vision_blocks(model):
        counts[block.part] += block.parameters
    counts["llm"] = (
        embedding_block(llm).parameters
        + llm.num_layers * sum(block.parameters for block in layer)
        + head_block(llm, tokens=0).parameters
    )
    return counts


def active_parts(trainable_parts: Collection[str], *, images: int) -> frozenset[str]:
    """Parts whose gradient a step needs: without images nothing of the vision side takes part."""
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
    attention_span: float | None = None,
) -> int:
    """Useful FLOPs of one optimizer step over all ranks.

    Args:
        model: sizes.
        seq_length: tokens per sequence S.
        sequences: sequences of the step (global batch).
        images: images of the step; 0 on a text-only step.
        trainable_parts: rows of `TRAINABLE_PARTS` that train.
        attention_span: mean segment length seen by a token, sum(s^2) / sum(s) over packed segments; default S, which
            is the published convention and overstates attention when document borders are masked.
    """
    trainable = active_parts(trainable_parts, images=images)
    tokens = seq_length * sequences
    span = seq_length if attention_span is None else attention_span
    layer = decoder_layer_blocks(model.llm, tokens=tokens, attention_span=span)
    decoder = model.llm.num_layers * train_flops(layer, trainable=trainable)
    head = train_flops([head_block(model.llm, tokens=tokens)], trainable=trainable)
    vision = images * train_flops(vision_blocks(model), trainable=trainable)
    return decoder + head + vision


def overhead_flops(blocks: Iterable[Block], *, trainable: frozenset[str]) -> int:
    """Forward and backward FLOPs of `Block.overhead`, products of activations like attention."""
    return sum(block.overhead * (3 if block.needs_backward(trainable) else 1) for block in blocks)


def mfu(flops: float, *, seconds: float, devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: useful `flops` of a step over what `devices` could do in its `seconds`, 0 to 1."""
    return flops / (seconds * devices * peak_flops)


def layer_recompute_flops(
    model: ModelConfig, *, tokens: int, attention_span: float, recompute: RecomputeConfig, trainable: frozenset[str]
) -> int:
    """Forward FLOPs that one decoder layer repeats in the backward pass."""
    attention, mlp = decoder_layer_blocks(model.llm, tokens=tokens, attention_span=attention_span)
    if recompute.granularity == "none" or not attention.needs_backward(trainable):
        return 0
    if recompute.granularity == "full":
        return attention.forward + mlp.forward
    return attention.attention * ("core_attn" in recompute.modules) + mlp.linear * ("mlp" in recompute.modules)


def vision_recompute_flops(model: ModelConfig, *, recompute: RecomputeConfig, trainable: frozenset[str]) -> int:
    """Forward FLOPs that the trained encoders repeat in the backward pass, per image."""
    if not recompute.vision:
        return 0
    blocks = [block for block in vision_blocks(model) if block.checkpoint is not None]
    return sum(block.forward + block.overhead for block in blocks if block.needs_backward(trainable))
