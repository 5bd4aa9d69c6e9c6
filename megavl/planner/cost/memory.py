"""Bytes per rank: weights, gradients, optimizer state, activations. An estimate to choose a layout by, not a guarantee.

Legend: as in `scenario.py`; a is the number of attention heads, s is t under sequence parallelism and else 1.

- Weights: e per parameter, frozen ones included. Gradients: 4 per trained parameter (fp32 accumulation).
- Optimizer: 8 per trained parameter for two fp32 moments; in bf16 4 more for the fp32 master weight. With
  optimizer.state_precision bf16 it is 6: two moments, and the bits that the bf16 weight lacks. The distributed
  optimizer divides them over data-parallel ranks.
- Decoder layer, per token, with fused kernels: 2e x H/s in each of two norms (input, output). Attention keeps 6e x H/t
  (fused qkv, rotated q and k, output) and 4 x a/t of log-sums. The MLP keeps 3e x F/t (gate, up, their product). The
  final norm keeps as much as another norm.
- Selective recompute drops the log-sums (core_attn) or the 3e x F/t (mlp). Full recompute keeps one input, e x H/s, for
  every recompute.num_layers layers. Either way one recomputed piece is alive at a time.
- The last stage holds e x V/t per token of one micro-batch: logits, or their gradient.
- The first stage keeps what the trained vision parts need, for every image that the rank encodes. The largest block
  that is frozen or recomputed is alive for a moment.
- A rank keeps as many micro-batches of each of its stages as the schedule leaves outstanding: min(p - rank, m) under
  1F1B, what `schedule.py` counts under interleaving.

Under `split_all` every rank holds the towers; all but the first stage's are copies without optimizer state.

- A rank encodes its share of the step's images a few at a time. A tower whose first layers train runs again for its
  gradient: all its activations for these few are alive then. If only its last layers train, it keeps what these need
  for the whole share.
- The pixels of the share stay (3 bytes each). If a tower trains, so do its features; if it runs again, so does its
  input.
- The first stage holds the features of all images until the pipeline is done, and their gradients if a tower trains.
- The towers' weight gradients are then summed in fp32: over the pieces, and in a copy over the ranks.

Not counted: the runtime's own memory, communication buffers, fragmentation, the data loader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megavl.config.model import ModelConfig
from megavl.config.recipe import ENCODED_AT_ONCE, TRAINABLE_PARTS
from megavl.planner.cost.blocks import Block, decoder_layer_blocks, embedding_block, head_block, vision_blocks
from megavl.planner.cost.flops import active_parts
from megavl.planner.scenario import Scenario
from megavl.planner.schedule import passes

_ADAPTOR = frozenset({"adaptor"})
_TOWERS = frozenset(TRAINABLE_PARTS) - {"llm", "adaptor"}


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Estimated bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the four, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_stages(scenario: Scenario, rank: int) -> tuple[int, ...]:
    """Stages on a pipeline rank, in the order of the data."""
    return tuple(range(rank, scenario.stages, scenario.pipeline))


def rank_parameters(scenario: Scenario, rank: int, layout: Sequence[int]) -> tuple[int, int]:
    """Parameters on one device of pipeline rank `rank`: all of them, and those that train."""
    recipe, tensor = scenario.recipe, scenario.tensor
    llm = recipe.model.llm
    width = llm.hidden_size
    # Norm weights are on every tensor-parallel rank, matrices are split.
    layer = sum(block.parameters for block in decoder_layer_blocks(llm))
    count = sum(layout[stage] for stage in rank_stages(scenario, rank))
    decoder = count * ((layer - 2 * width) // tensor + 2 * width)
    if rank == 0:
        decoder += embedding_block(llm).parameters // tensor
    if rank == scenario.pipeline - 1:
        decoder += (head_block(llm).parameters - width) // tensor + width
    vision, trained_vision = 0, 0
    if rank == 0:
        vision, trained_vision = _vision_parameters(recipe.model, recipe.trainable_parts, _TOWERS | _ADAPTOR)
    trained_decoder = decoder if "llm" in recipe.trainable_parts else 0
    return decoder + vision, trained_decoder + trained_vision


def rank_memory(scenario: Scenario, rank: int, layout: Sequence[int]) -> RankMemory:
    """Memory of one device of pipeline rank `rank`, by the formulas of this module."""
    parameters, trained = rank_parameters(scenario, rank, layout)
    per_weight = 12 if scenario.recipe.training.precision == "bf16" else 8
    if scenario.recipe.optimizer.state_precision == "bf16":
        per_weight = 6
    multimodal = scenario.images > 0 and scenario.share > 0
    kept: list[int] = []
    transient = 0
    for stage in rank_stages(scenario, rank):
        stays, passing = _decoder_activations(scenario, layers=layout[stage], multimodal=multimodal)
        if stage == 0 and multimodal:
            counts = {True: scenario.tower_images("multimodal"), False: scenario.adaptor_images("multimodal")}
            for towers, images in counts.items():
                per_image, largest = _image_activations(scenario, parts=_TOWERS if towers else _ADAPTOR)
                stays, passing = stays + math.ceil(images * per_image), passing + math.ceil(images * largest)
        kept.append(stays)
        transient = max(transient, passing)
    held = outstanding(rank, pipeline=scenario.pipeline, virtual=scenario.virtual, micro_batches=scenario.micro_batches)
    activations = max(sum(n * size for n, size in zip(row, kept, strict=True)) for row in held) + transient
    if rank == scenario.pipeline - 1:
        activations += _head_activations(scenario)
    copies = 0
    if multimodal and scenario.vision == "split_all":
        activations = max(activations, _towers_at_work(scenario)) + _up_front_activations(scenario, first=rank == 0)
        copies = 0 if rank == 0 else tower_parameters(scenario)[0]
    return RankMemory(
        weights=(parameters + copies) * scenario.element,
        gradients=4 * trained,
        optimizer=math.ceil(trained * per_weight / scenario.optimizer_ranks),
        activations=activations,
    )


def fullest_rank(scenario: Scenario, layout: Sequence[int]) -> tuple[int, RankMemory]:
    """The pipeline rank that needs the most memory, and its estimate."""
    ranks = [(rank, rank_memory(scenario, rank, layout)) for rank in range(scenario.pipeline)]
    return max(ranks, key=lambda item: item[1].total)


@lru_cache(maxsize=1024)
def outstanding(rank: int, *, pipeline: int, virtual: int, micro_batches: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches between their two passes for each of a rank's stages: one row per peak of their number."""
    if virtual == 1:
        return ((min(pipeline - rank, micro_batches),),)
    # Peaks repeat with every round of p micro-batches once the pipeline is full.
    held, found = [0] * virtual, set()
    for step in passes(rank, pipeline=pipeline, virtual=virtual, micro_batches=min(micro_batches, 4 * pipeline)):
        held[step.stage // pipeline] += -1 if step.backward else 1
        if not step.backward:
            found.add(tuple(held))
    return tuple(row for row in found if not any(_covers(other, row) for other in found))


def layer_bytes(scenario: Scenario) -> int:
    """Bytes that one decoder layer keeps of one micro-batch, nothing recomputed."""
    llm, tokens, element = scenario.recipe.model.llm, scenario.tokens, scenario.element
    norms = 2 * 2 * element * tokens * llm.hidden_size // scenario.sequence_ranks
    attention = 6 * element * tokens * llm.hidden_size // scenario.tensor
    return norms + attention + _log_sums(scenario) + _inner(scenario)


def recomputed_bytes(scenario: Scenario) -> int:
    """The part of `layer_bytes` that recompute does not keep."""
    recompute = scenario.recipe.recompute
    if recompute.granularity == "none":
        return 0
    if recompute.granularity == "full":
        return layer_bytes(scenario) - _input_bytes(scenario) // recompute.num_layers
    return _log_sums(scenario) * ("core_attn" in recompute.modules) + _inner(scenario) * ("mlp" in recompute.modules)


def _covers(other: tuple[int, ...], row: tuple[int, ...]) -> bool:
    return other != row and all(a >= b for a, b in zip(other, row, strict=True))


def _log_sums(scenario: Scenario) -> int:
    return 4 * scenario.tokens * scenario.recipe.model.llm.num_attention_heads // scenario.tensor


def _inner(scenario: Scenario) -> int:
    return 3 * scenario.element * scenario.tokens * scenario.recipe.model.llm.ffn_hidden_size // scenario.tensor


def _input_bytes(scenario: Scenario) -> int:
    return scenario.element * scenario.tokens * scenario.recipe.model.llm.hidden_size // scenario.sequence_ranks


def _decoder_activations(scenario: Scenario, *, layers: int, multimodal: bool) -> tuple[int, int]:
    """Bytes that a stage keeps per micro-batch, and bytes that are alive only during its recompute."""
    recompute, layer = scenario.recipe.recompute, layer_bytes(scenario)
    trainable = active_parts(scenario.recipe.trainable_parts, images=int(multimodal))
    if layers == 0 or not trainable:
        return 0, layer if layers else 0
    if recompute.granularity == "full":
        block = min(recompute.num_layers, layers)
        return math.ceil(layers / block) * _input_bytes(scenario), block * layer
    dropped = recomputed_bytes(scenario)
    return layers * (layer - dropped), dropped


def tower_parameters(scenario: Scenario) -> tuple[int, int]:
    """Parameters of the towers without the adaptor: all, and the trained ones."""
    return _vision_parameters(scenario.recipe.model, scenario.recipe.trainable_parts, _TOWERS)


def _image_activations(scenario: Scenario, *, parts: frozenset[str]) -> tuple[int, int]:
    """Bytes that vision parts keep per image, and bytes of their largest block that is alive only while it runs."""
    recipe = scenario.recipe
    kept, transient = _image_elements(recipe.model, recipe.trainable_parts, recipe.recompute.vision, parts)
    return kept * scenario.element, transient * scenario.element


@lru_cache(maxsize=64)
def _image_elements(
    model: ModelConfig, trained: tuple[str, ...], recomputed: bool, parts: frozenset[str]
) -> tuple[int, int]:
    kept, transient = 0, 0
    for block in vision_blocks(model):
        if block.part not in parts:
            continue
        stays = _kept_elements(block, trainable=frozenset(trained), recomputed=recomputed)
        kept += stays
        if stays < block.saved:
            transient = max(transient, block.saved)
    return kept, transient


@lru_cache(maxsize=64)
def _vision_parameters(model: ModelConfig, trained: tuple[str, ...], parts: frozenset[str]) -> tuple[int, int]:
    blocks = [block for block in vision_blocks(model) if block.part in parts]
    return sum(block.parameters for block in blocks), sum(b.parameters for b in blocks if b.part in trained)


def rerun_towers(scenario: Scenario) -> frozenset[str]:
    """Towers that `split_all` runs again for their gradient: those whose first layers train."""
    if scenario.vision != "split_all":
        return frozenset()
    trained = scenario.recipe.trainable_parts
    return frozenset(name for name, part in (("siglip", "siglip"), ("sam", "sam_trunk")) if part in trained)


def _rerun_parts(scenario: Scenario) -> frozenset[str]:
    """Rows of `TRAINABLE_PARTS` that belong to the towers that run again."""
    names = rerun_towers(scenario)
    return frozenset(part for part in _TOWERS if part.partition("_")[0] in names)


def _towers_at_work(scenario: Scenario) -> int:
    """Most bytes alive while a rank encodes its share of the images, runs it again, or sums weight gradients."""
    _, transient = _image_activations(scenario, parts=_TOWERS)
    again, _ = _image_activations(scenario, parts=_rerun_parts(scenario))
    encoding = math.ceil(min(scenario.images_up_front("multimodal"), ENCODED_AT_ONCE) * (again + transient))
    sums = 4 * tower_parameters(scenario)[1]
    return sums + max(encoding, sums)


def _up_front_activations(scenario: Scenario, *, first: bool) -> int:
    """Bytes that `split_all` keeps while the pipeline runs; the first stage also holds all features."""
    kept, _ = _image_activations(scenario, parts=_TOWERS - _rerun_parts(scenario))
    model, rerun = scenario.recipe.model, rerun_towers(scenario)
    each = 3.0 * model.canvas_size**2 + kept
    if tower_parameters(scenario)[1]:
        each += scenario.feature_bytes
    for tower, side in (("siglip", model.siglip.image_size), ("sam", model.canvas_size)):
        each += 3.0 * scenario.element * side**2 * (tower in rerun)
    out = scenario.images_up_front("multimodal") * each
    if first:
        whole = scenario.micro_batch_images("multimodal") * scenario.micro_batches
        out += whole * scenario.feature_bytes * (2 if tower_parameters(scenario)[1] else 1)
    return math.ceil(out)


def _kept_elements(block: Block, *, trainable: frozenset[str], recomputed: bool) -> int:
    if not block.needs_backward(trainable):
        return 0
    return block.checkpoint if recomputed and block.checkpoint is not None else block.saved


def _head_activations(scenario: Scenario) -> int:
    """Bytes of the final norm and of one micro-batch's logits."""
    llm, tokens, element = scenario.recipe.model.llm, scenario.tokens, scenario.element
    norm = 2 * element * tokens * llm.hidden_size // scenario.sequence_ranks
    return norm + element * tokens * llm.vocab_size // scenario.tensor
