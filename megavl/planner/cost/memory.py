"""Bytes per rank: weights, gradients, optimizer state, activations. An estimate for choosing a layout, not a guarantee.

Legend: `scenario.py`'s, and a attention heads, s = t under sequence parallelism else 1.

- weights: e per parameter, frozen ones included; gradients: 4 per trained parameter (fp32 accumulation).
- optimizer: two fp32 moments, 8 per trained parameter, and a fp32 master copy, 4 more, in bf16; divided over
  data-parallel ranks by the distributed optimizer.
- a decoder layer keeps, per token, 2e x H/s in each of two norms (input, output), 6e x H/t in attention (fused qkv,
  rotated q and k, output) with 4 x a/t of log-sums, and 3e x F/t in the MLP (gate and up, their product), as fused
  kernels do. The final norm keeps as much as another one.
- selective recompute drops the log-sums (core_attn) or the 3e x F/t (mlp); full recompute keeps one input, e x H/s, per
  recompute.num_layers layers. Either way one recomputed piece is alive at a time.
- the last stage holds e x V/t per token of one micro-batch: logits, or their gradient.
- the first stage keeps what the trained part of the vision side needs, of every image that the rank encodes, and for a
  moment the largest block that is frozen or recomputed.
- under `split_all` every rank holds the towers (the first stage's are the model's, the others copies without optimizer
  state) and encodes its share of the whole step's images a few at a time; a tower whose first layers train is run
  again for its gradient, so that all its activations of these few are alive then, where only its last layers train it
  keeps what these need of all of the share. Pixels of a share (3 bytes each) stay, where a tower trains its features
  too, and what a tower that runs again starts from. The first stage holds the features of all images, with gradients
  where a tower trains, until the pipeline is through. Then the towers' weight gradients are summed in fp32, over the
  pieces and in a copy over the ranks.
- a rank holds as many micro-batches of each of its stages as the schedule's order leaves outstanding: under 1F1B
  min(p - rank, m), under interleaving what `schedule.py` counts.

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
from megavl.planner.simulation.schedule import passes

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
    """Parameters on one device of pipeline rank `rank`: all of them, and those that train.

    Args:
        scenario: recipe and sizes.
        rank: pipeline rank, from 0.
        layout: decoder layers per stage.
    """
    recipe, tensor = scenario.recipe, scenario.tensor
    llm = recipe.model.llm
    width = llm.hidden_size
    # Norm weights are on every tensor-parallel rank, matrices are cut.
    layer = sum(block.parameters for block in decoder_layer_blocks(llm, tokens=0, attention_span=0))
    count = sum(layout[stage] for stage in rank_stages(scenario, rank))
    decoder = count * ((layer - 2 * width) // tensor + 2 * width)
    if rank == 0:
        decoder += embedding_block(llm).parameters // tensor
    if rank == scenario.pipeline - 1:
        decoder += (head_block(llm, tokens=0).parameters - width) // tensor + width
    vision, trained_vision = 0, 0
    if rank == 0:
        vision, trained_vision = _vision_parameters(recipe.model, recipe.trainable_parts)
    trained_decoder = decoder if "llm" in recipe.trainable_parts else 0
    return decoder + vision, trained_decoder + trained_vision


def rank_memory(scenario: Scenario, rank: int, layout: Sequence[int]) -> RankMemory:
    """Memory of one device of pipeline rank `rank`, by the formulas of this module.

    Args:
        scenario: recipe and sizes.
        rank: pipeline rank, from 0.
        layout: decoder layers per stage.
    """
    parameters, trained = rank_parameters(scenario, rank, layout)
    per_weight = 12 if scenario.recipe.training.precision == "bf16" else 8
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


def fits(scenario: Scenario, layout: Sequence[int], memory_bytes: int | None) -> bool:
    """Whether every rank's estimate is within `memory_bytes`; so it is where that is None."""
    if memory_bytes is None:
        return True
    return all(rank_memory(scenario, rank, layout).total <= memory_bytes for rank in range(scenario.pipeline))


@lru_cache(maxsize=1024)
def outstanding(rank: int, *, pipeline: int, virtual: int, micro_batches: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each of a rank's stages between forward and backward pass, wherever their number peaks."""
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
    """Of `layer_bytes`, what recompute makes again instead of keeping it."""
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
    """Bytes that a stage keeps per micro-batch, and bytes of the piece alive during its recompute."""
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
    """Parameters of the towers without the adaptor: all of them, and those that train."""
    model, trained = scenario.recipe.model, scenario.recipe.trainable_parts
    blocks = [block for block in vision_blocks(model) if block.part != "adaptor"]
    return sum(block.parameters for block in blocks), sum(b.parameters for b in blocks if b.part in trained)


def _image_activations(scenario: Scenario, *, parts: frozenset[str]) -> tuple[int, int]:
    """Bytes that parts of the vision side keep per image, and bytes of their largest block alive only while it runs."""
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
def _vision_parameters(model: ModelConfig, trained: tuple[str, ...]) -> tuple[int, int]:
    blocks = vision_blocks(model)
    return sum(block.parameters for block in blocks), sum(b.parameters for b in blocks if b.part in trained)


def rerun_towers(scenario: Scenario) -> frozenset[str]:
    """Towers that train from their first layers on, which `split_all` runs again for their gradient."""
    if scenario.vision != "split_all":
        return frozenset()
    trained = scenario.recipe.trainable_parts
    return frozenset(name for name, part in (("siglip", "siglip"), ("sam", "sam_trunk")) if part in trained)


def _rerun_parts(scenario: Scenario) -> frozenset[str]:
    """Groups of parameters of the towers that run again."""
    names = rerun_towers(scenario)
    return frozenset(part for part in _TOWERS if part.partition("_")[0] in names)


def _towers_at_work(scenario: Scenario) -> int:
    """Bytes alive while a rank encodes its share of the step's images, runs it again, or sums weight gradients."""
    _, transient = _image_activations(scenario, parts=_TOWERS)
    again, _ = _image_activations(scenario, parts=_rerun_parts(scenario))
    encoding = math.ceil(min(scenario.images_up_front("multimodal"), ENCODED_AT_ONCE) * (again + transient))
    sums = 4 * tower_parameters(scenario)[1]
    return sums + max(encoding, sums)


def _up_front_activations(scenario: Scenario, *, first: bool) -> int:
    """What `split_all` keeps while the pipeline runs: for the rank's images, and all features on the first stage."""
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
