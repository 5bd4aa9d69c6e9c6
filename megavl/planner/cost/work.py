"""Work of every block on one rank's device for one micro-batch: products, attention, bytes moved, bytes kept.

FLOPs come from `blocks.py` and `flops.py`. Bytes moved estimate what elementwise kernels read and write:

- A decoder layer moves three times what it keeps in the forward pass and six times in the backward pass. Residual sums
  and gradients move too, although they are not kept. These factors are assumed; with them the MFU of text models comes
  near published runs.
- A tower keeps more of what it moves: two and four times.
- A trained weight's gradient is written, read, and added to the fp32 buffer. In bf16 that is 12 bytes a weight, since
  nothing fuses the accumulation without Transformer Engine.
- The loss passes over the logits three times forward (two reads, then the gradient is written over them) and twice
  backward. Its fp32 values stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megavl.config.model import ModelConfig
from megavl.planner.cost.blocks import Block, decoder_layer_blocks, embedding_block, head_block, vision_blocks
from megavl.planner.cost.flops import active_parts
from megavl.planner.cost.memory import layer_bytes, recomputed_bytes, rerun_towers
from megavl.planner.scenario import Kind, Scenario

_LAYER_PASSES = (3, 6)
"""How many times a decoder layer moves the bytes that it keeps, forward and backward."""
_LOGIT_PASSES = (3, 2)
"""How many times the loss reads or writes a logit, forward and backward."""


@dataclass(frozen=True)
class Work:
    """Work of one pass of a block."""

    matrix: float = 0.0
    """FLOPs of products with weights."""
    attention: float = 0.0
    """FLOPs of products of activations."""
    moved: float = 0.0
    """Bytes that elementwise kernels read and write."""

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.matrix + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.matrix + other.matrix, self.attention + other.attention, self.moved + other.moved)

    def __mul__(self, factor: float) -> Work:
        return Work(self.matrix * factor, self.attention * factor, self.moved * factor)


@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """A named block of the model on one rank."""

    name: str
    """SAM, SigLIP, adaptor (per image), embedding, decoder layer, head + loss (per micro-batch)."""
    forward: Work
    backward: Work
    """Activation recompute included."""


def vision_work(scenario: Scenario, kind: Kind) -> tuple[BlockWork, ...]:
    """SAM (where there is one), SigLIP and adaptor, of one image."""
    recipe = scenario.recipe
    return _towers(
        recipe.model,
        active=_trainable(scenario, kind),
        again=recipe.recompute.vision,
        rerun=rerun_towers(scenario) if kind == "multimodal" else frozenset(),
        element=scenario.element,
    )


@lru_cache(maxsize=64)
def _towers(
    model: ModelConfig,
    *,
    active: frozenset[str],
    again: bool,
    rerun: frozenset[str],
    element: int,
) -> tuple[BlockWork, ...]:
    towers: dict[str, list[Block]] = {}
    for block in vision_blocks(model):
        towers.setdefault(block.name.partition(".")[0], []).append(block)
    out = []
    for key in (key for key in _TOWERS if key in towers):
        forward, backward = Work(), Work()
        for block in towers[key]:
            once = _forward([block], overhead=True) + Work(moved=2.0 * element * block.saved)
            forward += once
            if not block.needs_backward(active):
                continue
            weights = block.parameters if block.part in active else 0
            moved = 4.0 * element * block.saved + weights * _gradient_bytes(element)
            backward += _backward([block], active, overhead=True) + Work(moved=moved)
            backward += once if again and block.checkpoint is not None else Work()
        if key in rerun:
            backward += forward
        out.append(BlockWork(name=_TOWERS[key], forward=forward, backward=backward))
    return tuple(out)


ADAPTOR = "adaptor"
"""Name of the adaptor's block; the other vision blocks are towers."""
_TOWERS = {"sam": "SAM", "siglip": "SigLIP", "adaptor": ADAPTOR}


def embedding_work(scenario: Scenario, kind: Kind) -> BlockWork:
    """The token embedding on one tensor-parallel rank: a look-up, and a dense gradient."""
    block = embedding_block(scenario.recipe.model.llm)
    parameters = block.parameters / scenario.tensor
    trains = "llm" in scenario.recipe.trainable_parts
    moved = 2 * scenario.hidden_bytes
    gradient = Work(moved=moved + parameters * _gradient_bytes(scenario.element)) if trains else Work()
    return BlockWork(name="embedding", forward=Work(moved=moved), backward=gradient)


def layer_work(scenario: Scenario, kind: Kind) -> BlockWork:
    """One decoder layer on one tensor-parallel rank."""
    recipe, tensor = scenario.recipe, scenario.tensor
    trainable, length = _trainable(scenario, kind), recipe.data.seq_length
    attention, mlp = decoder_layer_blocks(recipe.model.llm, tokens=scenario.tokens, seq_length=length)
    whole = attention.parameters + mlp.parameters
    norms = 2 * recipe.model.llm.hidden_size
    parameters = (whole - norms) / tensor + norms
    kept, forward = layer_bytes(scenario), _forward([attention, mlp]) * (1 / tensor)
    forward += Work(moved=_LAYER_PASSES[0] * kept)
    backward = Work()
    if attention.needs_backward(trainable):
        backward = _backward([attention, mlp], trainable) * (1 / tensor)
        trained = parameters if "llm" in trainable else 0.0
        backward += Work(moved=_LAYER_PASSES[1] * kept + trained * _gradient_bytes(scenario.element))
        backward += _recomputed(scenario, attention, mlp, forward)
    return BlockWork(name="decoder layer", forward=forward, backward=backward)


def head_work(scenario: Scenario, kind: Kind) -> BlockWork:
    """Final norm, and output layer and loss on all but image positions, on one tensor-parallel rank."""
    recipe, tensor = scenario.recipe, scenario.tensor
    llm, trainable = recipe.model.llm, _trainable(scenario, kind)
    rows = scenario.loss_tokens(kind)
    block = head_block(llm, tokens=round(rows))
    parameters = (block.parameters - llm.hidden_size) / tensor + llm.hidden_size
    logits = rows * llm.vocab_size / tensor
    backward = Work()
    if block.needs_backward(trainable):
        trained = parameters if "llm" in trainable else 0.0
        moved = _LOGIT_PASSES[1] * scenario.element * logits + trained * _gradient_bytes(scenario.element)
        backward = _backward([block], trainable) * (1 / tensor) + Work(moved=moved)
    return BlockWork(
        name="head + loss",
        forward=_forward([block]) * (1 / tensor) + Work(moved=_LOGIT_PASSES[0] * scenario.element * logits),
        backward=backward,
    )


def _trainable(scenario: Scenario, kind: Kind) -> frozenset[str]:
    return active_parts(scenario.recipe.trainable_parts, images=int(kind == "multimodal"))


def _forward(blocks: Sequence[Block], *, overhead: bool = False) -> Work:
    return Work(
        matrix=sum(block.linear for block in blocks),
        attention=sum(block.attention + block.overhead * overhead for block in blocks),
    )


def _backward(blocks: Sequence[Block], trainable: frozenset[str], *, overhead: bool = False) -> Work:
    matrix, attention = 0, 0
    for block in blocks:
        products = 2 * block.attention if block.needs_backward(trainable) else 0
        matrix += block.backward(trainable) - products
        attention += products + (2 * block.overhead if overhead and products else 0)
    return Work(matrix=matrix, attention=attention)


def _recomputed(scenario: Scenario, attention: Block, mlp: Block, forward: Work) -> Work:
    """What one decoder layer recomputes in the backward pass, on one rank."""
    recompute, tensor = scenario.recipe.recompute, scenario.tensor
    if recompute.granularity != "selective":
        return forward if recompute.granularity == "full" else Work()
    return Work(
        matrix=mlp.linear * ("mlp" in recompute.modules) / tensor,
        attention=attention.attention * ("core_attn" in recompute.modules) / tensor,
        moved=2.0 * recomputed_bytes(scenario),
    )


def _gradient_bytes(element: int) -> float:
    """Bytes moved per weight to add a micro-batch's gradient to the fp32 buffer."""
    return 2 * element + 8
