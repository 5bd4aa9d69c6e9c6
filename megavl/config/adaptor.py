"""The table of adaptors: the linear layers of every kind. Names, shapes and cost follow from it.

Legend: P patches of an image, W width of both towers, n language width, d depth, HIGH SAM's and LOW SigLIP's features.

| kind | first layer | join | further layers, each after a GELU | from |
|---|---|---|---|---|
| linear | W -> n | - | none (d = 1) | release |
| mlp_gelu | W -> n | - | (d - 1) x n -> n | release; 1.3B, d = 2 |
| low_high_hybrid_split_mlp_gelu | W -> n/2 per tower | channels | (d - 1) x n -> n | release; 7B, d = 2 |
| shared_linear | 2W -> n | channels, before it | none (d = 1) | release |
| shared_mlp | 2W -> n | channels, before it | (d - 1) x n -> n | release; paper |
| separate_mlp | W -> n/2 per tower | channels, at the end | (d - 1) x n/2 -> n/2 per tower | paper |
| token_pooling_width | 2W -> n per tower | sequence | (d - 1) x n -> n | paper |
| token_pooling_height | 2W -> n per tower | sequence | (d - 1) x n -> n | paper |

HIGH stands before LOW in every join, and every kind gives P positions of width n. Token pooling stacks two neighbouring
patches on channels, which leaves P/2 positions per tower. The neighbours are in a row (width) or in a column (height).

Release: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/models/{clip_encoder,projector}.py`. The shared kinds are its
`linear` and `mlp_gelu` after towers joined as "feature".

Paper: arXiv 2403.05525v2, Table 11. It gives names and goals of its ablations, not their layers. We read them so:

- Shared: one weight over the channels of both towers, because the paper says that it fuses the features.
- Separate: the remaining member of the family, with first and further layers per tower.
- Token pooling: stacks patches instead of averaging them. The paper's text says "stacking", the row says "pooling"; the
  projector of DeepSeek-OCR stacks too. Each tower has its own first layer, as in the hybrid. The left or upper patch
  stands first.

Depths other than 2 are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

AdaptorKind = Literal[
    "linear",
    "mlp_gelu",
    "low_high_hybrid_split_mlp_gelu",
    "shared_linear",
    "shared_mlp",
    "separate_mlp",
    "token_pooling_width",
    "token_pooling_height",
]
Tower = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True)
class AdaptorLayer:
    """One linear layer with bias."""

    name: str
    """Name under `vision.adaptor.`."""
    inputs: int
    """Input channels."""
    outputs: int
    """Output channels."""
    positions: int
    """Positions of one image that pass through it."""
    towers: tuple[Tower, ...]
    """Towers whose features reach it."""
    first: bool
    """Whether it takes features; a further layer takes an earlier one's output after a GELU."""


@dataclass(frozen=True, kw_only=True)
class AdaptorSizes:
    """The sizes that determine the layers of a kind."""

    width: int
    """Width W of both towers."""
    hidden: int
    """Language width n."""
    patches: int
    """Patches P of an image."""
    depth: int
    """Linear layers in sequence d."""


@dataclass(frozen=True, kw_only=True)
class AdaptorRow:
    """A row of the table."""

    both_towers: bool
    """Whether it takes SAM's features and SigLIP's, or SigLIP's alone."""
    layers: Callable[[AdaptorSizes], tuple[AdaptorLayer, ...]]
    one_layer: bool = False
    """Whether it has no further layers, whatever the depth."""
    halves: bool = False
    """Whether each tower fills half of the language width, which must then be even."""
    pairs: bool = False
    """Whether it pairs patches of a row or column, whose number must then be even."""


BOTH: tuple[Tower, ...] = ("high", "low")


def _layer(
    sizes: AdaptorSizes,
    name: str,
    *,
    inputs: int,
    outputs: int,
    towers: tuple[Tower, ...],
    positions: int | None = None,
    first: bool = True,
) -> AdaptorLayer:
    positions = positions or sizes.patches
    return AdaptorLayer(name=name, inputs=inputs, outputs=outputs, positions=positions, towers=towers, first=first)


def _further(
    prefix: str, sizes: AdaptorSizes, *, width: int, towers: tuple[Tower, ...], index: int
) -> tuple[AdaptorLayer, ...]:
    """Layers after the first; a GELU stands before each, so that only every other index is a layer."""
    indices = range(index, index + 2 * (sizes.depth - 1), 2)
    return tuple(
        _layer(sizes, f"{prefix}.{index}", inputs=width, outputs=width, towers=towers, first=False) for index in indices
    )


def _chain(
    prefix: str, sizes: AdaptorSizes, *, inputs: int, outputs: int, towers: tuple[Tower, ...]
) -> tuple[AdaptorLayer, ...]:
    """A first layer and the further ones in one sequence."""
    first = _layer(sizes, f"{prefix}.0", inputs=inputs, outputs=outputs, towers=towers)
    return first, *_further(prefix, sizes, width=outputs, towers=towers, index=2)


def _single(sizes: AdaptorSizes, *, towers: tuple[Tower, ...]) -> tuple[AdaptorLayer, ...]:
    return (_layer(sizes, "layers", inputs=len(towers) * sizes.width, outputs=sizes.hidden, towers=towers),)


def _split_first(sizes: AdaptorSizes, *, inputs: int, outputs: int, positions: int) -> tuple[AdaptorLayer, ...]:
    """A first layer for each tower, then layers for both."""
    high, low = (
        _layer(sizes, f"{tower}_up_proj", inputs=inputs, outputs=outputs, positions=positions, towers=(tower,))
        for tower in BOTH
    )
    return high, low, *_further("layers", sizes, width=sizes.hidden, towers=BOTH, index=1)


def _hybrid(sizes: AdaptorSizes) -> tuple[AdaptorLayer, ...]:
    return _split_first(sizes, inputs=sizes.width, outputs=sizes.hidden // 2, positions=sizes.patches)


def _pooled(sizes: AdaptorSizes) -> tuple[AdaptorLayer, ...]:
    return _split_first(sizes, inputs=2 * sizes.width, outputs=sizes.hidden, positions=sizes.patches // 2)


def _separate(sizes: AdaptorSizes) -> tuple[AdaptorLayer, ...]:
    half = sizes.hidden // 2
    high, low = (_chain(f"{tower}_layers", sizes, inputs=sizes.width, outputs=half, towers=(tower,)) for tower in BOTH)
    return high + low


ADAPTORS: dict[AdaptorKind, AdaptorRow] = {
    "linear": AdaptorRow(both_towers=False, one_layer=True, layers=lambda s: _single(s, towers=("low",))),
    "mlp_gelu": AdaptorRow(
        both_towers=False,
        layers=lambda s: _chain("layers", s, inputs=s.width, outputs=s.hidden, towers=("low",)),
    ),
    "low_high_hybrid_split_mlp_gelu": AdaptorRow(both_towers=True, halves=True, layers=_hybrid),
    "shared_linear": AdaptorRow(both_towers=True, one_layer=True, layers=lambda s: _single(s, towers=BOTH)),
    "shared_mlp": AdaptorRow(
        both_towers=True,
        layers=lambda s: _chain("layers", s, inputs=2 * s.width, outputs=s.hidden, towers=BOTH),
    ),
    "separate_mlp": AdaptorRow(both_towers=True, halves=True, layers=_separate),
    "token_pooling_width": AdaptorRow(both_towers=True, pairs=True, layers=_pooled),
    "token_pooling_height": AdaptorRow(both_towers=True, pairs=True, layers=_pooled),
}


def kinds(*, both_towers: bool) -> tuple[AdaptorKind, ...]:
    """Kinds that take SigLIP's and SAM's features, or SigLIP's alone."""
    return tuple(kind for kind, row in ADAPTORS.items() if row.both_towers == both_towers)
