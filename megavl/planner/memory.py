"""Bytes per rank: weights, gradients, optimizer state, activations. An estimate for choosing a layout, not a guarantee.

Legend: T tokens of a micro-batch, H decoder width, F its SwiGLU width, V vocabulary, a heads, t tensor-parallel ranks,
s = t under sequence parallelism else 1, e bytes per element (2 for bf16, 4 for fp32).

- weights: e per parameter, frozen ones included; gradients: 4 per trained parameter (fp32 accumulation).
- optimizer: two fp32 moments, 8 per trained parameter, and a fp32 master copy, 4 more, in bf16; divided over
  data-parallel ranks.
- a decoder layer keeps, per token, (4 + 2e) x H/s in each of two norms (fp32 input, normalised, output), 6e x H/t in
  attention (fused qkv, rotated q and k, output) with 4 x a/t of log-sums, and 5e x F/t in the MLP (gate and up, up
  again, activated gate, product). The final norm keeps as much as another one.
- selective recompute drops the log-sums (core_attn) or the 5e x F/t (mlp); full recompute keeps one input, e x H/s, per
  recompute.num_layers layers. Either way one recomputed piece is alive at a time.
- the last stage holds (e + 4) x V/t per token of one micro-batch: logits and their fp32 softmax.
- the first stage keeps what the trained part of the vision side needs, of every image, and for a moment the largest
  block that is frozen or recomputed. Not divided over tensor ranks.
- 1F1B holds min(stages - stage, micro-batches) micro-batches of layer and vision activations.

Not counted: the runtime's own memory, communication buffers, fragmentation, the data loader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megavl.config.recipe import Recipe
from megavl.planner.blocks import Block, decoder_layer_blocks, embedding_block, head_block, vision_blocks
from megavl.planner.cost import active_parts

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a weight or activation by training.precision."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Estimated bytes on one rank of a pipeline stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the four, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_parameters(recipe: Recipe, *, stage: int, layers: int) -> tuple[int, int]:
    """Parameters on one rank of `stage` holding `layers` decoder layers: all of them, and those that train."""
    llm, tensor = recipe.model.llm, recipe.parallel.tensor
    width = llm.hidden_size
    # Norm weights are on every tensor-parallel rank, matrices are cut.
    layer = sum(block.parameters for block in decoder_layer_blocks(llm, tokens=0, attention_span=0))
    decoder = layers * ((layer - 2 * width) // tensor + 2 * width)
    vision, trained_vision = 0, 0
    if stage == 0:
        decoder += embedding_block(llm).parameters // tensor
        for block in vision_blocks(recipe.model):
            vision += block.parameters
            trained_vision += block.parameters * (block.part in recipe.trainable_parts)
    if stage == recipe.parallel.pipeline - 1:
        decoder += (head_block(llm, tokens=0).parameters - width) // tensor + width
    trained_decoder = decoder if "llm" in recipe.trainable_parts else 0
    return decoder + vision, trained_decoder + trained_vision


def stage_memory(
    recipe: Recipe,
    *,
    stage: int,
    layers: int,
    data_parallel: int,
    micro_batches: int,
    images_per_sequence: int,
) -> StageMemory:
    """Memory of one rank, by the formulas of this module.

    Args:
        recipe: the training stage.
        stage: pipeline stage, from 0.
        layers: decoder layers on it.
        data_parallel: data-parallel ranks.
        micro_batches: micro-batches per step and data-parallel rank.
        images_per_sequence: images in a multimodal sequence.
    """
    element = ELEMENT_BYTES[recipe.training.precision]
    parameters, trained = stage_parameters(recipe, stage=stage, layers=layers)
    state = math.ceil(trained * (12 if recipe.training.precision == "bf16" else 8) / data_parallel)
    in_flight = min(recipe.parallel.pipeline - stage, micro_batches)
    kept, transient = _decoder_activations(recipe, layers=layers, multimodal=images_per_sequence > 0)
    activations = in_flight * kept + transient
    if stage == 0 and images_per_sequence:
        kept, transient = _image_activations(recipe)
        activations += recipe.training.micro_batch_size * images_per_sequence * (in_flight * kept + transient)
    if stage == recipe.parallel.pipeline - 1:
        activations += _head_activations(recipe)
    return StageMemory(weights=parameters * element, gradients=4 * trained, optimizer=state, activations=activations)


def _tokens(recipe: Recipe) -> int:
    return recipe.training.micro_batch_size * recipe.data.seq_length


def _decoder_activations(recipe: Recipe, *, layers: int, multimodal: bool) -> tuple[int, int]:
    """Bytes kept per micro-batch, and bytes of the piece alive during its recompute."""
    llm, parallel, recompute = recipe.model.llm, recipe.parallel, recipe.recompute
    tokens, element = _tokens(recipe), ELEMENT_BYTES[recipe.training.precision]
    sequence_ranks = parallel.tensor if parallel.sequence_parallel else 1
    norms = 2 * (4 + 2 * element) * tokens * llm.hidden_size // sequence_ranks
    attention = 6 * element * tokens * llm.hidden_size // parallel.tensor
    sums = 4 * tokens * llm.num_attention_heads // parallel.tensor
    inner = 5 * element * tokens * llm.ffn_hidden_size // parallel.tensor
    layer = norms + attention + sums + inner
    trainable = active_parts(recipe.trainable_parts, images=int(multimodal))
    if layers == 0 or not trainable:
        return 0, layer if layers else 0
    if recompute.granularity == "none":
        return layers * layer, 0
    if recompute.granularity == "full":
        block = min(recompute.num_layers, layers)
        return math.ceil(layers / block) * element * tokens * llm.hidden_size // sequence_ranks, block * layer
    dropped = sums * ("core_attn" in recompute.modules) + inner * ("mlp" in recompute.modules)
    return layers * (layer - dropped), dropped


def _image_activations(recipe: Recipe) -> tuple[int, int]:
    """Bytes kept per image, and bytes of the largest block alive only while it runs."""
    element = ELEMENT_BYTES[recipe.training.precision]
    trainable = frozenset(recipe.trainable_parts)
    kept, transient = 0, 0
    for block in vision_blocks(recipe.model):
        stays = _kept_elements(block, trainable=trainable, recomputed=recipe.recompute.vision)
        kept += stays
        if stays < block.saved:
            transient = max(transient, block.saved)
    return kept * element, transient * element


def _kept_elements(block: Block, *, trainable: frozenset[str], recomputed: bool) -> int:
    if not block.needs_backward(trainable):
        return 0
    return block.checkpoint if recomputed and block.checkpoint is not None else block.saved


def _head_activations(recipe: Recipe) -> int:
    """Bytes of the final norm and of one micro-batch's logits."""
    llm, parallel = recipe.model.llm, recipe.parallel
    tokens, element = _tokens(recipe), ELEMENT_BYTES[recipe.training.precision]
    norm = (4 + 2 * element) * tokens * llm.hidden_size // (parallel.tensor if parallel.sequence_parallel else 1)
    return norm + (element + 4) * tokens * llm.vocab_size // parallel.tensor
