"""Canonical names of a model's parameters: the names that they have on one rank, with unfused norms.

Checkpoints, conversion and generation all refer to a parameter by this name. Names in the towers and the adaptor are
the released repository's (`vision.siglip.`, `vision.sam.`, `vision.adaptor.`); names in `language_model.` are
megatron-core's.
"""

from __future__ import annotations

from megavl.config.model import DecoderConfig, ModelConfig, SamConfig, SiglipConfig

Shape = tuple[int, ...]

LAYERS = "language_model.decoder.layers."
"""Prefix of every decoder layer; its number and a dot follow."""
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Canonical name of each norm that Transformer Engine, and so megatron-core's checkpoint, keeps in a projection."""


def canonical_name(parameter: str, *, first_layer: int = 0) -> str:
    """Canonical name of a module's parameter.

    Args:
        parameter: its name in the module of one pipeline stage.
        first_layer: index in the whole model of the stage's first decoder layer.
    """
    if not parameter.startswith(LAYERS):
        return parameter
    layer, _, rest = parameter.removeprefix(LAYERS).partition(".")
    return f"{LAYERS}{int(layer) + first_layer}.{FUSED_NORMS.get(rest, rest)}"


def canonical_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every parameter by canonical name, computed from the sizes alone.

    The rows of a `linear_qkv` are ordered (heads, [q, k, v], channels of a head), as in megatron-core.
    """
    shapes = {f"vision.siglip.{name}": shape for name, shape in _siglip(config.siglip).items()}
    if config.sam is not None:
        shapes |= {f"vision.sam.{name}": shape for name, shape in _sam(config.sam).items()}
    shapes |= {f"vision.adaptor.{name}": shape for name, shape in _adaptor(config).items()}
    return shapes | {f"language_model.{name}": shape for name, shape in _decoder(config.llm).items()}


def _linear(name: str, out_width: int, in_width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_width, in_width), f"{name}.bias": (out_width,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _patch_embed(width: int, patch: int) -> dict[str, Shape]:
    return {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}


def _block(prefix: str, *, width: int, mlp_dim: int, mlp_names: tuple[str, str]) -> dict[str, Shape]:
    return (
        _norm(f"{prefix}.norm1", width)
        | _linear(f"{prefix}.attn.qkv", 3 * width, width)
        | _linear(f"{prefix}.attn.proj", width, width)
        | _norm(f"{prefix}.norm2", width)
        | _linear(f"{prefix}.mlp.{mlp_names[0]}", mlp_dim, width)
        | _linear(f"{prefix}.mlp.{mlp_names[1]}", width, mlp_dim)
    )


def _siglip(tower: SiglipConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"pos_embed": (1, tower.grid**2, tower.width)}
    shapes |= _patch_embed(tower.width, tower.patch_size)
    for index in range(tower.depth):
        shapes |= _block(f"blocks.{index}", width=tower.width, mlp_dim=tower.mlp_dim, mlp_names=("fc1", "fc2"))
    return shapes | _norm("norm", tower.width)


def _sam(tower: SamConfig) -> dict[str, Shape]:
    width, channels, head_dim = tower.width, tower.neck_channels, tower.width // tower.heads
    shapes: dict[str, Shape] = {"pos_embed": (1, tower.grid, tower.grid, width)}
    shapes |= _patch_embed(width, tower.patch_size)
    for index in range(tower.depth):
        span = tower.grid if index in tower.global_attn_indexes else tower.window_size
        shapes |= _block(f"blocks.{index}", width=width, mlp_dim=tower.mlp_dim, mlp_names=("lin1", "lin2"))
        shapes |= {f"blocks.{index}.attn.rel_pos_{axis}": (2 * span - 1, head_dim) for axis in "hw"}
    for neck in ("neck", "neck_hd"):
        shapes[f"{neck}.0.weight"] = (channels, width, 1, 1)
        shapes |= _norm(f"{neck}.1", channels)
        shapes[f"{neck}.2.weight"] = (channels, channels, 3, 3)
        shapes |= _norm(f"{neck}.3", channels)
    shapes["downsamples.0.weight"] = (2 * channels, channels, 3, 3)
    shapes["downsamples.1.weight"] = (4 * channels, 2 * channels, 3, 3)
    shapes["hd_alpha_downsamples"] = (1,)
    return shapes


def _adaptor(config: ModelConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for layer in config.adaptor_layers:
        shapes |= _linear(layer.name, layer.outputs, layer.inputs)
    return shapes


def _decoder(llm: DecoderConfig) -> dict[str, Shape]:
    hidden, ffn = llm.hidden_size, llm.ffn_hidden_size
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (llm.vocab_size, hidden)}
    for index in range(llm.num_layers):
        layer = LAYERS.removeprefix("language_model.") + str(index)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attention.linear_qkv.weight"] = (3 * hidden, hidden)
        shapes[f"{layer}.self_attention.linear_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.pre_mlp_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.linear_fc1.weight"] = (2 * ffn, hidden)
        shapes[f"{layer}.mlp.linear_fc2.weight"] = (hidden, ffn)
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    shapes["output_layer.weight"] = (llm.vocab_size, hidden)
    return shapes
