"""Sizes of a DeepSeek-VL model: language model, SigLIP, SAM and adaptor.

Sources: deepseek-ai/DeepSeek-VL `deepseek_vl/models/` (released code) and arXiv 2403.05525.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megavl.config.adaptor import ADAPTORS, AdaptorKind, AdaptorLayer, AdaptorSizes, kinds
from megavl.config.bounds import Layers, NonNegative, PositiveReal, Size
from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import UsageError
from megavl.config.presets import HYBRID_BACKGROUND, SIGLIP_BACKGROUND, ImageGeometry

STRICT = ConfigDict(extra="forbid", defer_build=True)
"""Validators are built when a recipe is read, once for all sections."""


def _require(condition: bool, path: str, message: str) -> None:
    if not condition:
        raise UsageError(f"{path}: {message}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DecoderConfig:
    """LLaMA-like language model (DeepSeek-LLM): RMSNorm, rotate-half RoPE, SwiGLU, no biases, untied head."""

    hidden_size: Size
    """Width H."""
    ffn_hidden_size: Size
    """Inner width of the SwiGLU block."""
    num_layers: Layers
    """Number of decoder layers."""
    num_attention_heads: Size
    """Attention heads; the head dimension is hidden_size / num_attention_heads."""
    vocab_size: Size
    """Rows V of the embedding and of the head. 102400 in the released models, more than the tokenizer has entries."""
    max_position_embeddings: Size = 16384
    """Largest context length that an exported configuration states."""
    rope_theta: PositiveReal = 10000.0
    """Base of the rotary embedding."""
    rms_norm_eps: PositiveReal = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: PositiveReal = 0.02
    """Standard deviation of random initial weights."""

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "model.llm.num_attention_heads",
            f"{self.num_attention_heads} heads do not divide model.llm.hidden_size {self.hidden_size}; "
            "choose a divisor",
        )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _TowerConfig:
    """Sizes that both vision towers have."""

    section: ClassVar[str]

    image_size: Size
    """Side of the square input, pixels."""
    patch_size: Size
    """Side of a patch, pixels."""
    width: Size
    """Channels of the transformer."""
    depth: Layers
    """Transformer blocks."""
    heads: Size
    """Attention heads."""
    mlp_dim: Size
    """Inner width of the MLP."""

    def __post_init__(self) -> None:
        for whole, part in (("image_size", "patch_size"), ("width", "heads")):
            size, divisor = getattr(self, whole), getattr(self, part)
            _require(
                size % divisor == 0,
                f"{self.section}.{part}",
                f"{divisor} does not divide {self.section}.{whole} {size}; choose a divisor",
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SiglipConfig(_TowerConfig):
    """SigLIP ViT tower; exact erf GELU, no class token, final LayerNorm always applied."""

    section: ClassVar[str] = "model.siglip"

    layer_norm_eps: PositiveReal = 1e-6
    """Epsilon of every LayerNorm."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamConfig(_TowerConfig):
    """SAM ViT tower with windowed and global attention, neck, HD branch and two stride-2 convolutions."""

    section: ClassVar[str] = "model.sam"

    window_size: Size
    """Side of an attention window, patches."""
    global_attn_indexes: tuple[NonNegative, ...]
    """Blocks with global attention; the first one feeds the HD branch."""
    neck_channels: Size
    """Channels of the neck; the convolutions after it have 2 x and 4 x as many."""
    layer_norm_eps: PositiveReal = 1e-6
    """Epsilon of every LayerNorm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            bool(self.global_attn_indexes) and max(self.global_attn_indexes) < self.depth,
            "model.sam.global_attn_indexes",
            f"{list(self.global_attn_indexes)} must be non-empty and below model.sam.depth {self.depth}",
        )

    @property
    def output_dim(self) -> int:
        """Channels after the two stride-2 convolutions."""
        return 4 * self.neck_channels


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptorConfig:
    """Projection of vision features to the language model's width (`aligner` in the released code)."""

    kind: AdaptorKind
    """Row of `megavl.config.adaptor.ADAPTORS`."""
    depth: Layers = 2
    """Linear layers in sequence."""

    def __post_init__(self) -> None:
        _require(
            self.depth == 1 or not ADAPTORS[self.kind].one_layer,
            "model.adaptor.depth",
            f"{self.depth} layers, but {self.kind} has one; set model.adaptor.depth=1 or choose a kind with an MLP",
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """A DeepSeek-VL model."""

    preset: str
    """1b, 7b, small, tiny-hybrid or tiny-siglip: the row of `megavl.config.presets.MODELS` with the other fields'
    defaults. `custom`: they have none. Instead of a preset, `from: init` takes all sizes from `checkpoint.init`."""
    llm: DecoderConfig
    siglip: SiglipConfig
    sam: SamConfig | None = None
    """Absent in the 1.3B model."""
    adaptor: AdaptorConfig
    image_token_id: NonNegative = 100015
    """Id of `<image_placeholder>`."""
    eos_token_ids: tuple[NonNegative, ...] = ()
    """Ids that end an answer, where a model was published with several; default: the tokenizer's EOS alone."""
    system_prompt: str = SYSTEM_PROMPT
    """System text of conversations that bring none, in every command and in exports: what `preprocess.py
    --system-prompt` was given. Empty: none. Default: that of the released models."""

    def __post_init__(self) -> None:
        _check_adaptor(self)
        _require(
            0 <= self.image_token_id < self.llm.vocab_size,
            "model.image_token_id",
            f"{self.image_token_id} is outside model.llm.vocab_size {self.llm.vocab_size}",
        )
        for token in self.eos_token_ids:
            _require(
                0 <= token < self.llm.vocab_size,
                "model.eos_token_ids",
                f"{token} is outside model.llm.vocab_size {self.llm.vocab_size}",
            )
        if self.sam is None:
            return
        _require(
            self.sam.output_dim == self.siglip.width,
            "model.sam.neck_channels",
            f"4 x {self.sam.neck_channels} must equal model.siglip.width {self.siglip.width}",
        )
        _require(
            3 * self.sam.grid == 8 * self.siglip.grid,
            "model.sam.image_size",
            f"the SAM grid of {self.sam.grid} patches must be 8/3 of the SigLIP grid of {self.siglip.grid}",
        )

    @property
    def adaptor_layers(self) -> tuple[AdaptorLayer, ...]:
        """Linear layers of the adaptor."""
        sizes = AdaptorSizes(
            width=self.siglip.width, hidden=self.llm.hidden_size, patches=self.siglip.grid**2, depth=self.adaptor.depth
        )
        return ADAPTORS[self.adaptor.kind].layers(sizes)

    @property
    def image_tokens(self) -> int:
        """Positions that one image takes in the sequence."""
        return self.siglip.grid**2

    @property
    def canvas_size(self) -> int:
        """Side in pixels of the square uint8 image that the first stage takes."""
        return self.sam.image_size if self.sam else self.siglip.image_size

    @property
    def image_geometry(self) -> ImageGeometry:
        """How an image becomes the square uint8 canvas that the first stage takes."""
        return ImageGeometry(
            canvas_size=self.canvas_size,
            low_size=self.siglip.image_size,
            patch_size=self.siglip.patch_size,
            background=HYBRID_BACKGROUND if self.sam else SIGLIP_BACKGROUND,
        )


def _check_adaptor(model: ModelConfig) -> None:
    kind, row, both = model.adaptor.kind, ADAPTORS[model.adaptor.kind], model.sam is not None
    _require(
        row.both_towers == both,
        "model.adaptor.kind",
        f"{kind} {'cannot take' if both else 'needs'} a model.sam tower; "
        f"{'' if both else 'add one, or '}use {' or '.join(kinds(both_towers=both))}",
    )
    _require(
        not row.halves or model.llm.hidden_size % 2 == 0,
        "model.llm.hidden_size",
        f"{model.llm.hidden_size} is odd, and {kind} gives each tower half of it; choose an even width",
    )
    _require(
        not row.pairs or model.siglip.grid % 2 == 0,
        "model.siglip.image_size",
        f"{model.siglip.image_size} makes a grid of {model.siglip.grid} patches, and {kind} pairs neighbours in it; "
        f"choose a size of an even number of patches of {model.siglip.patch_size}, and model.sam.image_size to match",
    )
