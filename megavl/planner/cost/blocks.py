"""Parameters, FLOPs and saved activations of every block of the model, in the order in which data flows.

Legend: N patches of a vision grid, W tower width, M tower MLP width, H decoder width, F its SwiGLU width, V vocabulary.

A multiply-add counts as two FLOPs. As in published figures, only matrix products and convolutions count. Norms,
softmax, activations and interpolation do not, nor does SAM's relative-position bias (0.5% of that tower). Our fused
attention computes this bias with extra channels. Their cost is `Block.overhead`: it takes time, but is not part of MFU.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache

from megavl.config.adaptor import AdaptorLayer
from megavl.config.model import DecoderConfig, ModelConfig, SamConfig, SiglipConfig

SIGLIP = frozenset({"siglip"})
SAM_TRUNK = frozenset({"sam_trunk"})
SAM = frozenset({"sam_trunk", "sam_neck", "sam_hd", "sam_downsamples"})
VISION = SIGLIP | SAM | {"adaptor"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Cost of one block: of a vision block per image, of a decoder block per sequence."""

    name: str
    part: str
    """Row of `megavl.config.recipe.TRAINABLE_PARTS` that its parameters belong to."""
    parameters: int
    linear: int
    """Forward FLOPs of products with weights."""
    attention: int = 0
    """Forward FLOPs of products of activations (scores and values)."""
    overhead: int = 0
    """Forward FLOPs of the implementation beyond the model's definition; they count as time, not for MFU."""
    below: frozenset[str]
    """Parts whose weights this block's input depends on; if one of them trains, the input needs a gradient."""
    saved: int = 0
    """Elements kept for the backward pass (vision blocks only; the decoder's are split over ranks in `memory.py`)."""
    checkpoint: int | None = None
    """Elements kept instead of `saved` when the block is recomputed in the backward pass; None: it never is."""

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return self.linear + self.attention

    def needs_backward(self, trainable: Set[str]) -> bool:
        """Whether this block trains, or a part that its input depends on."""
        return self.part in trainable or bool(self.below & trainable)

    def backward(self, trainable: Set[str]) -> int:
        """FLOPs of the backward pass: a weight gradient and an input gradient cost one forward each."""
        products = (self.part in trainable) + bool(self.below & trainable)
        return self.linear * products + (2 * self.attention if products else 0)


@lru_cache(maxsize=16)
def vision_blocks(model: ModelConfig) -> tuple[Block, ...]:
    """Both encoders and the adaptor, per image."""
    sam = _sam_blocks(model.sam, low_grid=model.siglip.grid) if model.sam else ()
    return _siglip_blocks(model.siglip) + sam + _adaptor_blocks(model)


def decoder_layer_blocks(llm: DecoderConfig, *, tokens: int = 0, seq_length: int = 0) -> tuple[Block, Block]:
    """Attention and MLP of one decoder layer, for `tokens` positions in sequences that one document fills.

    Attention is causal: a token sees half of the sequence on average.
    """
    width, inner = llm.hidden_size, llm.ffn_hidden_size
    below = VISION | {"llm"}
    attention = Block(
        name="decoder.attention",
        part="llm",
        parameters=4 * width**2 + width,
        linear=2 * tokens * 4 * width**2,
        attention=2 * tokens * seq_length * width,
        below=below,
    )
    mlp = Block(
        name="decoder.mlp",
        part="llm",
        parameters=3 * width * inner + width,
        linear=2 * tokens * 3 * width * inner,
        below=below,
    )
    return attention, mlp


def embedding_block(llm: DecoderConfig) -> Block:
    """Token embedding: a look-up, no FLOPs."""
    parameters = llm.vocab_size * llm.hidden_size
    return Block(name="embedding", part="llm", parameters=parameters, linear=0, below=frozenset())


def head_block(llm: DecoderConfig, *, tokens: int = 0) -> Block:
    """Final norm and output layer, for `tokens` positions."""
    matrix = llm.vocab_size * llm.hidden_size
    return Block(
        name="head",
        part="llm",
        parameters=matrix + llm.hidden_size,
        linear=2 * tokens * matrix,
        below=VISION | {"llm"},
    )


def _siglip_blocks(config: SiglipConfig) -> tuple[Block, ...]:
    tokens, width, mlp = config.grid**2, config.width, config.mlp_dim
    patch = 3 * config.patch_size**2
    blocks = [
        Block(
            name="siglip.patch_embed",
            part="siglip",
            parameters=patch * width + width + tokens * width,
            linear=2 * tokens * patch * width,
            below=frozenset(),
            saved=tokens * patch,
        )
    ]
    for index in range(config.depth):
        blocks.append(
            Block(
                name=f"siglip.blocks.{index}",
                part="siglip",
                parameters=4 * width**2 + 2 * width * mlp + 9 * width + mlp,
                linear=2 * tokens * (4 * width**2 + 2 * width * mlp),
                attention=4 * tokens**2 * width,
                below=SIGLIP,
                # Norms in and out (4), fused qkv (3), attention out (1); GELU in and out.
                saved=tokens * (8 * width + 2 * mlp),
                checkpoint=tokens * width,
            )
        )
    norm = Block(name="siglip.norm", part="siglip", parameters=2 * width, linear=0, below=SIGLIP, saved=tokens * width)
    return (*blocks, norm)


def _sam_blocks(config: SamConfig, *, low_grid: int) -> tuple[Block, ...]:
    return (
        _sam_patch_embed(config),
        *(_sam_block(config, index=index) for index in range(config.depth)),
        *_sam_neck(config, name="sam.neck", part="sam_neck", extra_parameters=0),
        *_sam_neck(config, name="sam.neck_hd", part="sam_hd", extra_parameters=1),
        *_sam_downsamples(config, low_grid=low_grid, source="sam_neck", name="sam.downsamples", owner=True),
        *_sam_downsamples(config, low_grid=low_grid, source="sam_hd", name="sam.downsamples_hd", owner=False),
    )


def _sam_patch_embed(config: SamConfig) -> Block:
    tokens, patch = config.grid**2, 3 * config.patch_size**2
    return Block(
        name="sam.patch_embed",
        part="sam_trunk",
        parameters=patch * config.width + config.width + tokens * config.width,
        linear=2 * tokens * patch * config.width,
        below=frozenset(),
        saved=tokens * patch,
    )


def _sam_block(config: SamConfig, *, index: int) -> Block:
    """One transformer block; windowed ones pad the grid to whole windows, and padded positions are computed too."""
    tokens, width, mlp = config.grid**2, config.width, config.mlp_dim
    side = config.grid if index in config.global_attn_indexes else config.window_size
    windows = math.ceil(config.grid / side) ** 2
    padded = windows * side**2
    head_dim = width // config.heads
    # Fused attention takes the bias of 2 x side values per query as that many extra channels of q, k and v.
    wide = config.heads * (head_dim + 2 * side)
    return Block(
        name=f"sam.blocks.{index}",
        part="sam_trunk",
        parameters=4 * width**2 + 2 * width * mlp + 9 * width + mlp + 2 * (2 * side - 1) * head_dim,
        linear=2 * padded * 4 * width**2 + 2 * tokens * 2 * width * mlp,
        attention=4 * windows * side**4 * width,
        overhead=4 * windows * side**4 * (wide - width),
        below=SAM_TRUNK,
        # Norm inputs, norm2's output (3), GELU in and out; norm1's output in windows, qkv, output (5), four wide ones.
        saved=tokens * (3 * width + 2 * mlp) + padded * (5 * width + 4 * wide),
        checkpoint=tokens * width,
    )


def _sam_neck(config: SamConfig, *, name: str, part: str, extra_parameters: int) -> tuple[Block, Block]:
    tokens, width, neck = config.grid**2, config.width, config.neck_channels
    first = Block(
        name=f"{name}.0",
        part=part,
        parameters=width * neck + 2 * neck,
        linear=2 * tokens * width * neck,
        below=SAM_TRUNK,
        saved=tokens * (width + neck),
    )
    second = Block(
        name=f"{name}.2",
        part=part,
        parameters=9 * neck**2 + 2 * neck + extra_parameters,
        linear=2 * tokens * 9 * neck**2,
        below=SAM_TRUNK | {part},
        saved=2 * tokens * neck,
    )
    return first, second


def _sam_downsamples(config: SamConfig, *, low_grid: int, source: str, name: str, owner: bool) -> tuple[Block, Block]:
    """The two stride-2 convolutions, run once for each neck; `owner` is the neck that their weights count for."""
    neck, below = config.neck_channels, SAM_TRUNK | {source}
    first_weights, second_weights = 9 * neck * 2 * neck, 9 * 2 * neck * 4 * neck
    first = Block(
        name=f"{name}.0",
        part="sam_downsamples",
        parameters=first_weights if owner else 0,
        linear=2 * (2 * low_grid) ** 2 * first_weights,
        below=below,
        saved=(4 * low_grid) ** 2 * neck,
    )
    second = Block(
        name=f"{name}.1",
        part="sam_downsamples",
        parameters=second_weights if owner else 0,
        linear=2 * low_grid**2 * second_weights,
        below=below | {"sam_downsamples"},
        saved=(2 * low_grid) ** 2 * 2 * neck,
    )
    return first, second


def _adaptor_blocks(model: ModelConfig) -> tuple[Block, ...]:
    return tuple(
        Block(
            name=f"adaptor.{layer.name}",
            part="adaptor",
            parameters=layer.inputs * layer.outputs + layer.outputs,
            linear=2 * layer.positions * layer.inputs * layer.outputs,
            below=_below_adaptor(layer),
            # A later layer also keeps the input of the GELU before it, which is as wide as its own.
            saved=(1 if layer.first else 2) * layer.positions * layer.inputs,
        )
        for layer in model.adaptor_layers
    )


def _below_adaptor(layer: AdaptorLayer) -> frozenset[str]:
    towers = {"low": SIGLIP, "high": SAM}
    parts = frozenset[str]() if layer.first else frozenset({"adaptor"})
    return parts.union(*(towers[tower] for tower in layer.towers))
