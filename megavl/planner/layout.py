"""Decoder layers per pipeline stage, balanced by FLOPs, and megatron-core's notation for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavl.config.model import ModelConfig
from megavl.config.recipe import Recipe
from megavl.planner.blocks import decoder_layer_blocks, embedding_block, head_block, vision_blocks
from megavl.planner.cost import (
    active_parts,
    layer_recompute_flops,
    overhead_flops,
    train_flops,
    vision_recompute_flops,
)

PACKED_IMAGES = 5
"""Images that preprocessing packs into one sequence at most, by default."""


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Forward, backward and recompute FLOPs of one micro-batch on one rank of a stage."""

    layer: float
    """One decoder layer, divided over tensor-parallel ranks."""
    first: float
    """Encoders and adaptor, which every tensor-parallel rank repeats; on the first stage."""
    last: float
    """Output layer, divided over tensor-parallel ranks; on the last stage."""

    def of(self, stage: int, *, layers: int, stages: int) -> float:
        """FLOPs of `stage` holding `layers` decoder layers."""
        edges = (self.first if stage == 0 else 0.0) + (self.last if stage == stages - 1 else 0.0)
        return edges + layers * self.layer


def expected_images(recipe: Recipe) -> int:
    """Images assumed in a multimodal sequence: what packing allows, or what fits; 0 without multimodal steps."""
    if recipe.data.multimodal_fraction == 0:
        return 0
    return min(PACKED_IMAGES, recipe.data.seq_length // recipe.model.image_tokens)


def stage_costs(recipe: Recipe, *, images_per_sequence: float) -> StageCosts:
    """Costs of a micro-batch with `images_per_sequence` images in every sequence; 0 is text only.

    The one blank image that a text-only step encodes for overlapped gradient reduction is left out: it falls on the
    last micro-batch alone.
    """
    model, tensor = recipe.model, recipe.parallel.tensor
    sequences, span = recipe.training.micro_batch_size, recipe.data.seq_length
    images = images_per_sequence * sequences
    trainable = active_parts(recipe.trainable_parts, images=math.ceil(images))
    tokens = sequences * span
    layer = train_flops(decoder_layer_blocks(model.llm, tokens=tokens, attention_span=span), trainable=trainable)
    layer += layer_recompute_flops(
        model, tokens=tokens, attention_span=span, recompute=recipe.recompute, trainable=trainable
    )
    encoders = vision_blocks(model)
    image = train_flops(encoders, trainable=trainable) + overhead_flops(encoders, trainable=trainable)
    image += vision_recompute_flops(model, recompute=recipe.recompute, trainable=trainable)
    head = train_flops([head_block(model.llm, tokens=tokens)], trainable=trainable)
    return StageCosts(layer=layer / tensor, first=image * images, last=head / tensor)


def expected_costs(recipe: Recipe, *, images_per_sequence: float) -> StageCosts:
    """Mean of multimodal and text-only steps, weighted by data.multimodal_fraction."""
    share = recipe.data.multimodal_fraction
    multimodal = stage_costs(recipe, images_per_sequence=images_per_sequence)
    text = stage_costs(recipe, images_per_sequence=0)
    return StageCosts(
        layer=share * multimodal.layer + (1 - share) * text.layer,
        first=share * multimodal.first + (1 - share) * text.first,
        last=share * multimodal.last + (1 - share) * text.last,
    )


def split_layers(num_layers: int, *, stages: int, costs: StageCosts) -> tuple[int, ...]:
    """The split whose slowest stage is fastest; of these the most even one, then the one with fewer early layers.

    Early stages hold the activations of more micro-batches, hence the last rule. Exact, by two passes of dynamic
    programming over (stage, layers so far): the smallest bottleneck, then the smallest sum of squares under it.
    """

    def cost(stage: int, layers: int) -> float:
        return costs.of(stage, layers=layers, stages=stages)

    totals = range(num_layers + 1)
    bottleneck = [cost(0, total) for total in totals]
    for stage in range(1, stages):
        bottleneck = [
            min(max(bottleneck[total - here], cost(stage, here)) for here in range(total + 1)) for total in totals
        ]
    limit = bottleneck[num_layers]

    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(stages):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for total, (squares, split) in best.items():
            for here in range(num_layers - total + 1):
                if cost(stage, here) > limit:
                    break
                candidate = (squares + here * here, (*split, here))
                if total + here not in longer or candidate < longer[total + here]:
                    longer[total + here] = candidate
        best = longer
    return best[num_layers][1]


def balance_layers(recipe: Recipe, *, images_per_sequence: float | None = None) -> tuple[int, ...]:
    """Decoder layers per pipeline stage that minimise the largest expected stage time.

    Time is taken as proportional to FLOPs. The first stage pays the encoders on multimodal steps, the last one the
    output layer; the loss itself and the embedding look-up have no matrix product and count nothing.

    Args:
        recipe: the stage to balance for; parallel.layout is not read.
        images_per_sequence: mean images of a multimodal sequence; default `expected_images`.
    """
    images = expected_images(recipe) if images_per_sequence is None else images_per_sequence
    costs = expected_costs(recipe, images_per_sequence=images)
    return split_layers(recipe.model.llm.num_layers, stages=recipe.parallel.pipeline, costs=costs)


def balance_weights(model: ModelConfig, *, stages: int, tensor: int = 1) -> tuple[int, ...]:
    """Decoder layers per pipeline stage for inference: the fullest rank holds as few weights as possible.

    A token passes all stages one after the other, so an even split buys no speed; a stage must fit its device.

    Args:
        model: sizes.
        stages: pipeline stages.
        tensor: tensor-parallel ranks, over which everything but the encoders is divided.
    """
    layer = sum(block.parameters for block in decoder_layer_blocks(model.llm, tokens=0, attention_span=0))
    vision = sum(block.parameters for block in vision_blocks(model))
    costs = StageCosts(
        layer=layer / tensor,
        first=vision + embedding_block(model.llm).parameters / tensor,
        last=head_block(model.llm, tokens=0).parameters / tensor,
    )
    return split_layers(model.llm.num_layers, stages=stages, costs=costs)


def resolve_layout(recipe: Recipe) -> tuple[int, ...]:
    """Decoder layers per pipeline stage: parallel.layout, or the balanced split when it is `auto`."""
    if recipe.parallel.layout == "auto":
        return balance_layers(recipe)
    return recipe.parallel.layout


def layout_string(layers_per_stage: Sequence[int]) -> str | None:
    """megatron-core's `pipeline_model_parallel_layout`, e.g. `Et*6|t*8|t*8|t*8L`.

    None for one stage: there megatron-core would read the string's stages as virtual ones.
    """
    if len(layers_per_stage) == 1:
        return None
    stages = [f"t*{layers}" if layers else "" for layers in layers_per_stage]
    return f"E{'|'.join(stages)}L"
