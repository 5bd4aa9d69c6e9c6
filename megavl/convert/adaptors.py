"""Which adaptors a format can hold, and how the original format's configuration names them.

Source: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/models/{clip_encoder,projector}.py` (concat_type,
projector_type); transformers 4.57.6, `models/deepseek_vl*` (two layers, no choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megavl.config.adaptor import ADAPTORS, AdaptorKind
from megavl.config.bounds import MAX_LAYERS
from megavl.config.errors import UsageError
from megavl.config.model import ModelConfig
from megavl.convert.language import Fields

NATIVE_DEPTH = 2
"""Layers of the native adaptors: `linear1`, `linear2` and their hybrid counterparts."""
NATIVE_KINDS: tuple[AdaptorKind, ...] = ("mlp_gelu", "low_high_hybrid_split_mlp_gelu")


@dataclass(frozen=True)
class OriginalAdaptor:
    """Fields of the original configuration for one kind."""

    concat_type: Literal["tuple", "feature"] | None
    """How the towers are joined before the aligner; None with one tower."""
    projector_type: str


ORIGINAL: dict[AdaptorKind, OriginalAdaptor] = {
    "linear": OriginalAdaptor(None, "linear"),
    "mlp_gelu": OriginalAdaptor(None, "mlp_gelu"),
    "low_high_hybrid_split_mlp_gelu": OriginalAdaptor("tuple", "low_high_hybrid_split_mlp_gelu"),
    "shared_linear": OriginalAdaptor("feature", "linear"),
    "shared_mlp": OriginalAdaptor("feature", "mlp_gelu"),
}
"""Kinds that the original format holds, at any depth."""


def require_holdable(config: ModelConfig, fmt: Literal["native", "original"]) -> None:
    """Refuse an adaptor that a format cannot hold.

    Raises:
        UsageError: names kind, format and remedy.
    """
    kind, depth = config.adaptor.kind, config.adaptor.depth
    in_original = kind in ORIGINAL
    if in_original if fmt == "original" else kind in NATIVE_KINDS and depth == NATIVE_DEPTH:
        return
    held = " and ".join(NATIVE_KINDS) + f" of depth {NATIVE_DEPTH}" if fmt == "native" else ", ".join(ORIGINAL)
    remedy = (
        "use the original format"
        if in_original
        else "no Hugging Face format does, so keep the MegaVL checkpoint, which megavl generate and evaluate read"
    )
    raise UsageError(
        f"model.adaptor: the {fmt} format has no place for kind {kind} of depth {depth}, only for {held}; {remedy}"
    )


def original_params(config: ModelConfig) -> dict[str, Any]:
    """`aligner_config.params` of an original configuration; the adaptor must be one that the format holds."""
    row = ORIGINAL[config.adaptor.kind]
    return {
        "projector_type": row.projector_type,
        "depth": config.adaptor.depth,
        "input_dim": _input_dim(row, config.siglip.width),
        "n_embed": config.llm.hidden_size,
    }


def read_original(params: Fields, *, concat_type: Literal["tuple", "feature"] | None, sizes: dict[str, Any]) -> Any:
    """Fields of `AdaptorConfig` from `aligner_config.params`.

    Args:
        concat_type: how the towers before it are joined; None with one tower.
        sizes: `siglip` and `llm` as read so far.

    Raises:
        CheckpointError: a projector that the release cannot run after such towers, or sizes that do not fit them.
    """
    rows = {kind: row for kind, row in ORIGINAL.items() if row.concat_type == concat_type}
    found = params.get("projector_type")
    for kind, row in rows.items():
        if row.projector_type == found:
            params.require("input_dim", _input_dim(row, sizes["siglip"]["width"]))
            params.require("n_embed", sizes["llm"]["hidden_size"])
            # The release does not look at the depth of a linear one.
            depth = 1 if ADAPTORS[kind].one_layer else params.integer("depth", limit=MAX_LAYERS)
            return {"kind": kind, "depth": depth}
    towers = "one tower" if concat_type is None else f"towers joined by concat_type {concat_type!r}"
    known = " or ".join(row.projector_type for row in rows.values())
    raise params.error("projector_type", f"expected {known} behind {towers}, found {found!r}")


def _input_dim(row: OriginalAdaptor, width: int) -> int:
    return 2 * width if row.concat_type == "feature" else width
