"""The weight table of each format: which tensors of a file make up which parameter, in both directions.

Formats:
    native: transformers' `DeepseekVLForConditionalGeneration` and `DeepseekVLHybridForConditionalGeneration`.
    original: the deepseek-ai release (`MultiModalityCausalLM`).
    llm: the decoder alone, as transformers' `LlamaForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from megavl.config.adaptor import AdaptorKind
from megavl.config.model import ModelConfig
from megavl.convert.adaptors import require_holdable
from megavl.convert.transforms import Copy, DropFirstAxis, InterleaveHeads, StackRows, Transform
from megavl.weights.canonical_names import LAYERS, Shape, canonical_shapes

Format = Literal["native", "original"]
FORMATS: tuple[Format, ...] = ("native", "original")
"""Formats of a whole model."""
Export = Literal["native", "original", "llm"]
EXPORTS: tuple[Export, ...] = (*FORMATS, "llm")


@dataclass(frozen=True)
class WeightRow:
    """One parameter and the tensors of a file that hold it."""

    name: str
    """Canonical name."""
    shape: Shape
    """Shape of the parameter."""
    keys: tuple[str, ...]
    """Names in the file, in the order that the transform takes them."""
    transform: Transform

    @property
    def key_shapes(self) -> dict[str, Shape]:
        """Shape of each tensor in the file."""
        return dict(zip(self.keys, self.transform.part_shapes(self.shape), strict=True))


@dataclass(frozen=True)
class UnusedParameter:
    """A parameter that the released classes have but never use."""

    key: str
    """Name in the original format."""
    shape: Shape
    fill: float
    """Value of every element if no source has the tensor: 1 for the scale of a norm, else 0."""

    def synthesise(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor for a model whose source lacks it."""
        return torch.full(self.shape, self.fill, dtype=dtype)


# Canonical name after `vision.siglip.`, native name after NATIVE_SIGLIP; `{i}` a block, `*` weight or bias.
_SIGLIP: tuple[tuple[str, tuple[str, ...], Transform], ...] = (
    ("pos_embed", ("embeddings.position_embedding.weight",), DropFirstAxis()),
    ("patch_embed.proj.*", ("embeddings.patch_embedding.*",), Copy()),
    ("blocks.{i}.norm1.*", ("encoder.layers.{i}.layer_norm1.*",), Copy()),
    (
        "blocks.{i}.attn.qkv.*",
        tuple(f"encoder.layers.{{i}}.self_attn.{part}_proj.*" for part in "qkv"),
        StackRows(3),
    ),
    ("blocks.{i}.attn.proj.*", ("encoder.layers.{i}.self_attn.out_proj.*",), Copy()),
    ("blocks.{i}.norm2.*", ("encoder.layers.{i}.layer_norm2.*",), Copy()),
    ("blocks.{i}.mlp.fc1.*", ("encoder.layers.{i}.mlp.fc1.*",), Copy()),
    ("blocks.{i}.mlp.fc2.*", ("encoder.layers.{i}.mlp.fc2.*",), Copy()),
    ("norm.*", ("post_layernorm.*",), Copy()),
)

# Canonical name after `vision.sam.`, native name after `model.`.
_SAM_TRUNK = "high_res_vision_model.vision_encoder."
_SAM: tuple[tuple[str, tuple[str, ...], Transform], ...] = (
    ("pos_embed", (_SAM_TRUNK + "pos_embed",), Copy()),
    ("patch_embed.proj.*", (_SAM_TRUNK + "patch_embed.projection.*",), Copy()),
    ("blocks.{i}.norm1.*", (_SAM_TRUNK + "layers.{i}.layer_norm1.*",), Copy()),
    ("blocks.{i}.attn.qkv.*", (_SAM_TRUNK + "layers.{i}.attn.qkv.*",), Copy()),
    ("blocks.{i}.attn.proj.*", (_SAM_TRUNK + "layers.{i}.attn.proj.*",), Copy()),
    ("blocks.{i}.attn.rel_pos_h", (_SAM_TRUNK + "layers.{i}.attn.rel_pos_h",), Copy()),
    ("blocks.{i}.attn.rel_pos_w", (_SAM_TRUNK + "layers.{i}.attn.rel_pos_w",), Copy()),
    ("blocks.{i}.norm2.*", (_SAM_TRUNK + "layers.{i}.layer_norm2.*",), Copy()),
    ("blocks.{i}.mlp.lin1.*", (_SAM_TRUNK + "layers.{i}.mlp.lin1.*",), Copy()),
    ("blocks.{i}.mlp.lin2.*", (_SAM_TRUNK + "layers.{i}.mlp.lin2.*",), Copy()),
    ("neck.0.weight", (_SAM_TRUNK + "neck.conv1.weight",), Copy()),
    ("neck.1.*", (_SAM_TRUNK + "neck.layer_norm1.*",), Copy()),
    ("neck.2.weight", (_SAM_TRUNK + "neck.conv2.weight",), Copy()),
    ("neck.3.*", (_SAM_TRUNK + "neck.layer_norm2.*",), Copy()),
    ("neck_hd.0.weight", ("high_res_vision_neck.conv1.weight",), Copy()),
    ("neck_hd.1.*", ("high_res_vision_neck.layer_norm1.*",), Copy()),
    ("neck_hd.2.weight", ("high_res_vision_neck.conv2.weight",), Copy()),
    ("neck_hd.3.*", ("high_res_vision_neck.layer_norm2.*",), Copy()),
    ("downsamples.0.weight", ("high_res_vision_proj.conv1.weight",), Copy()),
    ("downsamples.1.weight", ("high_res_vision_proj.conv2.weight",), Copy()),
    ("hd_alpha_downsamples", ("high_res_vision_alpha",), Copy()),
)

# Canonical name after `vision.adaptor.`, native name after `model.aligner.`.
_ADAPTORS: dict[AdaptorKind, tuple[tuple[str, tuple[str, ...], Transform], ...]] = {
    "mlp_gelu": (
        ("layers.0.*", ("linear1.*",), Copy()),
        ("layers.2.*", ("linear2.*",), Copy()),
    ),
    "low_high_hybrid_split_mlp_gelu": (
        ("high_up_proj.*", ("high_res_vision_proj.*",), Copy()),
        ("low_up_proj.*", ("vision_proj.*",), Copy()),
        ("layers.1.*", ("proj.*",), Copy()),
    ),
}

NATIVE_SIGLIP = "model.vision_model.vision_model."
"""Prefix in the nested layout, the published one and the only one that transformers 4.57 reads."""
NATIVE_SIGLIP_UNNESTED = "model.vision_model."
"""Prefix that transformers 5.10 and later write for a model that was built from scratch."""

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
"""The two matrices that `tie_word_embeddings` makes one, as transformers' `LlamaForCausalLM` names them."""
NATIVE_EMBEDDING = f"model.language_model.{EMBEDDING}"
DECODER = "language_model."
"""Prefix of the decoder's canonical names."""
_DECODERS: dict[Export, tuple[str, str]] = {
    "native": ("model.language_model.", HEAD),
    "original": ("language_model.model.", f"language_model.{HEAD}"),
    "llm": ("model.", HEAD),
}
"""Prefix of the decoder's names, and name of its head."""

POOL_PREFIX = "attn_pool."
POOL: tuple[tuple[str, str, tuple[int, int] | None, str], ...] = (
    ("latent", "head.probe", None, "1 1 W"),
    ("q.*", "head.attention.in_proj_*", (0, 1), "W W"),
    ("kv.*", "head.attention.in_proj_*", (1, 3), "2W W"),
    ("proj.*", "head.attention.out_proj.*", None, "W W"),
    ("norm.*", "head.layernorm.*", None, "W"),
    ("mlp.fc1.*", "head.mlp.fc1.*", None, "M W"),
    ("mlp.fc2.*", "head.mlp.fc2.*", None, "W M"),
)
"""SigLIP's attention pool: original name, transformers' name, first and last third of its rows there, shape.

W is the tower's width and M its MLP width; `*` is weight or bias.
"""

_ORIGINAL_SAM = "vision_model.vision_tower_high.vision_tower."


def weight_rows(config: ModelConfig, fmt: Export) -> tuple[WeightRow, ...]:
    """The table of one format at the sizes of `config`; every parameter stands in exactly one row.

    Raises:
        UsageError: the format cannot hold the adaptor.
    """
    shapes = canonical_shapes(config)
    if fmt == "llm":
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(DECODER)}
        rows = list(_decoder_rows(config, fmt, shapes))
    else:
        require_holdable(config, fmt)
        rows = [*_vision_rows(config, fmt, shapes), *_decoder_rows(config, fmt, shapes)]
    assert sorted(row.name for row in rows) == sorted(shapes), "the weight table covers every canonical name once"
    return tuple(rows)


def key_shapes(config: ModelConfig, fmt: Format) -> dict[str, Shape]:
    """Name and shape of every tensor that a complete file of this format holds, unused ones included."""
    shapes = {key: shape for row in weight_rows(config, fmt) for key, shape in row.key_shapes.items()}
    if fmt == "original":
        shapes |= {unused.key: unused.shape for unused in unused_parameters(config)}
    return shapes


def unused_parameters(config: ModelConfig) -> tuple[UnusedParameter, ...]:
    """Parameters that only the original format has: SigLIP's attention pool and, with SAM, two layer norms."""
    sizes = {"1": 1, "W": config.siglip.width, "2W": 2 * config.siglip.width, "M": config.siglip.mlp_dim}
    shapes: dict[str, Shape] = {}
    for name, _, _, axes in POOL:
        for kind in ("weight", "bias") if "*" in name else ("",):
            shape = tuple(sizes[axis] for axis in axes.split())
            key = _original_siglip(config) + POOL_PREFIX + name.replace("*", kind)
            shapes[key] = shape[:1] if kind == "bias" else shape
    if config.sam is not None:
        for norm in ("high_layer_norm", "low_layer_norm"):
            shapes |= dict.fromkeys((f"vision_model.{norm}.weight", f"vision_model.{norm}.bias"), (sizes["W"],))
    return tuple(UnusedParameter(key, shape, float(key.endswith("norm.weight"))) for key, shape in shapes.items())


def native_pool_keys(config: ModelConfig) -> frozenset[str]:
    """Attention-pool names of a native file saved with `vision_use_head: true`; the native classes never use them."""
    kinds = ("weight", "bias")
    return frozenset(NATIVE_SIGLIP + key.replace("*", kind) for _, key, _, _ in POOL for kind in kinds)


def _original_siglip(config: ModelConfig) -> str:
    return f"vision_model.vision_tower{'' if config.sam is None else '_low.vision_tower'}."


def _vision_rows(config: ModelConfig, fmt: Format, shapes: dict[str, Shape]) -> Iterator[WeightRow]:
    if fmt == "original":
        prefixes = {
            "vision.siglip.": _original_siglip(config),
            "vision.sam.": _ORIGINAL_SAM,
            "vision.adaptor.": "aligner.",
        }
        for prefix, original in prefixes.items():
            for name, shape in shapes.items():
                if name.startswith(prefix):
                    yield WeightRow(name, shape, (original + name.removeprefix(prefix),), Copy())
        return
    tables = [
        ("vision.siglip.", NATIVE_SIGLIP, _SIGLIP, config.siglip.depth),
        ("vision.adaptor.", "model.aligner.", _ADAPTORS[config.adaptor.kind], 0),
    ]
    if config.sam is not None:
        tables.append(("vision.sam.", "model.", _SAM, config.sam.depth))
    for prefix, native, patterns, depth in tables:
        for pattern, keys, transform in patterns:
            for name, names in _expand(prefix + pattern, tuple(native + key for key in keys), depth):
                yield WeightRow(name, shapes[name], names, transform)


def _expand(name: str, keys: tuple[str, ...], depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    for index in map(str, range(depth)) if "{i}" in name else ("",):
        for kind in ("weight", "bias") if "*" in name else ("",):
            yield _fill(name, index, kind), tuple(_fill(key, index, kind) for key in keys)


def _fill(pattern: str, index: str, kind: str) -> str:
    return pattern.replace("{i}", index).replace("*", kind)


def _decoder_rows(config: ModelConfig, fmt: Export, shapes: dict[str, Shape]) -> Iterator[WeightRow]:
    heads = config.llm.num_attention_heads
    backbone, head = _DECODERS[fmt]
    layer = LAYERS + "{i}."
    attention, mlp = backbone + "layers.{i}.self_attn.", backbone + "layers.{i}.mlp."
    patterns: tuple[tuple[str, tuple[str, ...], Transform], ...] = (
        ("language_model.embedding.word_embeddings.weight", (backbone + "embed_tokens.weight",), Copy()),
        (layer + "input_layernorm.weight", (backbone + "layers.{i}.input_layernorm.weight",), Copy()),
        (
            layer + "self_attention.linear_qkv.weight",
            tuple(f"{attention}{part}_proj.weight" for part in "qkv"),
            InterleaveHeads(heads),
        ),
        (layer + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), Copy()),
        (layer + "pre_mlp_layernorm.weight", (backbone + "layers.{i}.post_attention_layernorm.weight",), Copy()),
        (layer + "mlp.linear_fc1.weight", (mlp + "gate_proj.weight", mlp + "up_proj.weight"), StackRows(2)),
        (layer + "mlp.linear_fc2.weight", (mlp + "down_proj.weight",), Copy()),
        ("language_model.decoder.final_layernorm.weight", (backbone + "norm.weight",), Copy()),
        ("language_model.output_layer.weight", (head,), Copy()),
    )
    for pattern, keys, transform in patterns:
        for name, names in _expand(pattern, keys, config.llm.num_layers):
            yield WeightRow(name, shapes[name], names, transform)
