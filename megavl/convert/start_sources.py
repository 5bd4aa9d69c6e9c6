"""The three public models that a DeepSeek-VL starts from, each seen as the part of the model that it becomes.

| model | layouts | recognised by the end of a name |
|---|---|---|
| DeepSeek-LLM | transformers' `LlamaForCausalLM` | - |
| SigLIP | timm and open_clip; transformers' `SiglipModel`, `SiglipVisionModel` | patch embedding |
| SAM | segment-anything; transformers' `SamModel`, `SamVisionModel` | patch embedding |

What stands before that end is the tower's prefix (`visual.trunk.`, `vision_model.`, `image_encoder.`, none, ...);
tensors without it belong to other parts of the same model and are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError
from megavl.config.model import AdaptorConfig, ModelConfig
from megavl.convert.adaptors import NATIVE_DEPTH, NATIVE_KINDS
from megavl.convert.dtypes import cast
from megavl.convert.flat_names import Shape, flat_shapes
from megavl.convert.language import Fields, read_llama
from megavl.convert.lazy import require_exactly
from megavl.convert.native_format import SAM_DEFAULTS, SIGLIP_DEFAULTS, read_sam, read_siglip
from megavl.convert.safetensors_in import read_json
from megavl.convert.table import NATIVE_SIGLIP, WeightRow, dead_tensors, weight_rows
from megavl.convert.transforms import Copy
from megavl.convert.weight_files import StoredTensor, StoredTensors, open_folder, open_source

_NATIVE_LLM, _NATIVE_SAM = "model.language_model.", "model.high_res_vision_model.vision_encoder."
_SIGLIP_ENDS = {"timm": "patch_embed.proj.weight", "transformers": "embeddings.patch_embedding.weight"}
_SAM_ENDS = {"segment-anything": "patch_embed.proj.weight", "transformers": "patch_embed.projection.weight"}
_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
_POOL = "attn_pool."
_TRANSFORMERS_POOL: dict[str, tuple[str, tuple[int, int] | None]] = {
    "latent": ("head.probe", None),
    "q.*": ("head.attention.in_proj_*", (0, 1)),
    "kv.*": ("head.attention.in_proj_*", (1, 3)),
    "proj.*": ("head.attention.out_proj.*", None),
    "norm.*": ("head.layernorm.*", None),
    "mlp.fc1.*": ("head.mlp.fc1.*", None),
    "mlp.fc2.*": ("head.mlp.fc2.*", None),
}
"""Attention pool: the original format's name, transformers' name, and which thirds of its rows."""


@dataclass(frozen=True, kw_only=True)
class TakenTensor:
    """A tensor of the model made of tensors of a source."""

    row: WeightRow
    parts: tuple[StoredTensor, ...]
    """Tensors of the source, in the order that the row's transform takes them."""
    dtype: torch.dtype
    """Type of the result; the parts may have others."""
    thirds: tuple[int, int] | None = None
    """First and last third of the rows of the only part; None for all of it."""

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        return self.row.shape

    def load(self) -> Tensor:
        """Read, cast and join the parts."""
        parts = [cast(part.load(), self.dtype, name=part.name, source=str(part.file.path)) for part in self.parts]
        if self.thirds is None:
            return self.row.transform.to_flat(parts)
        first, last = (len(parts[0]) // 3 * third for third in self.thirds)
        return parts[0][first:last].clone()


@dataclass(frozen=True, kw_only=True)
class StartSource:
    """What one public model contributes."""

    path: Path
    tensors: dict[str, TakenTensor]
    """By flat name."""
    unused: dict[str, TakenTensor]
    """Dead tensors of the original format by their original names: SigLIP's attention pool, where the source has it."""
    left_out: int
    """Tensors of other parts of the same model."""


def read_llm(folder: Path, *, config: ModelConfig, dtype: torch.dtype) -> StartSource:
    """A language model in LLaMA format.

    Args:
        folder: `config.json` and weights as transformers saves them.
        config: sizes asked for.
        dtype: type of the result.

    Raises:
        CheckpointError: other sizes than asked for; a missing, unexpected or misshapen tensor; a damaged or hostile
            file.
    """
    where = folder / "config.json"
    _require_sizes(read_llama(read_json(where), where=where), config, "llm", where)
    tensors = open_folder(folder)
    rows = [
        dataclasses.replace(row, keys=tuple(key.replace(_NATIVE_LLM, "model.") for key in row.keys))
        for row in _native_rows(config)
        if row.flat.startswith("language_model.")
    ]
    ignored = [name for name in tensors if name.endswith(_DERIVED)]
    return _source(folder, tensors, rows, config=config, dtype=dtype, prefix="", ignored=ignored)


def read_siglip_tower(path: Path, *, config: ModelConfig, dtype: torch.dtype) -> StartSource:
    """A SigLIP image tower in a file or folder, in any of the layouts above; a text tower beside it is left out.

    Args:
        path: weight file, or folder with one set of weights.
        config: sizes asked for.
        dtype: type of the result.

    Raises:
        CheckpointError: as `read_llm`, or no tower is found.
    """
    tensors = open_source(path)
    layout, prefix = _layout(tensors, _SIGLIP_ENDS, "SigLIP")
    pool: dict[str, tuple[str, tuple[int, int] | None]]
    if layout == "timm":
        rows = _same_names(config, "vision.siglip.")
        pool = {name: (_POOL + name, None) for name in _pool_rows(config)}
    else:
        _check_tower(path, config, "siglip")
        rows = _native_tower(config, "vision.siglip.", NATIVE_SIGLIP)
        pool = {
            name.replace("*", kind): (key.replace("*", kind), thirds)
            for name, (key, thirds) in _TRANSFORMERS_POOL.items()
            for kind in (("weight", "bias") if "*" in name else ("",))
        }
    ignored = [prefix + key for key, _ in pool.values()]
    ignored += [name for name in tensors if name.endswith(_DERIVED)]
    source = _source(path, tensors, rows, config=config, dtype=dtype, prefix=prefix, ignored=ignored)
    unused = _pool_tensors(tensors, pool, config=config, prefix=prefix, dtype=dtype)
    return dataclasses.replace(source, unused=unused)


def read_sam_tower(path: Path, *, config: ModelConfig, dtype: torch.dtype) -> StartSource:
    """A SAM image encoder in a file or folder, in any of the layouts above; the rest of SAM is left out.

    Args:
        path: weight file, or folder with one set of weights.
        config: sizes asked for.
        dtype: type of the result.

    Raises:
        CheckpointError: as `read_llm`, or no encoder is found.
    """
    tensors = open_source(path)
    layout, prefix = _layout(tensors, _SAM_ENDS, "SAM")
    if layout == "transformers":
        _check_tower(path, config, "sam")
    rows = _native_tower(config, "vision.sam.", _NATIVE_SAM)
    if layout == "segment-anything":
        public = {row.flat for row in rows}
        rows = [row for row in _same_names(config, "vision.sam.") if row.flat in public]
    return _source(path, tensors, rows, config=config, dtype=dtype, prefix=prefix, ignored=())


def _source(
    path: Path,
    tensors: StoredTensors,
    rows: list[WeightRow],
    *,
    config: ModelConfig,
    dtype: torch.dtype,
    prefix: str,
    ignored: Any,
) -> StartSource:
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = {prefix + key: shape for row in rows for key, shape in row.key_shapes.items()}
    require_exactly(expected, found=found, locate=tensors.locate, ignored=ignored, wanted=f"preset {config.preset}")
    taken = {}
    for row in rows:
        parts = tuple(tensors[prefix + key] for key in row.keys)
        for part in parts:
            # A type that no weights have is refused here, before anything is written.
            part.file.describe(part.name)
        taken[row.flat] = TakenTensor(row=row, parts=parts, dtype=dtype)
    return StartSource(path=path, tensors=taken, unused={}, left_out=len(tensors) - len(found))


def _layout(tensors: StoredTensors, ends: Mapping[str, str], what: str) -> tuple[str, str]:
    """Layout and prefix of the only tower."""
    found = [
        (layout, name.removesuffix(end))
        for name in tensors
        for layout, end in ends.items()
        if name.endswith(end) and (name == end or name[-len(end) - 1] == ".")
    ]
    if len(found) != 1:
        problem = f"{len(found)} {what} towers ({', '.join(prefix for _, prefix in found)})" if found else f"no {what}"
        raise CheckpointError(
            f"{tensors.source}: holds {problem}; expected are weights with one tensor named "
            f"{' or '.join(f'...{end} ({layout})' for layout, end in ends.items())}"
        )
    return found[0]


def _native_rows(config: ModelConfig) -> tuple[WeightRow, ...]:
    # The adaptor comes from none of the sources, and the native format does not have all of them.
    adaptor = AdaptorConfig(kind=NATIVE_KINDS[config.sam is not None], depth=NATIVE_DEPTH)
    return weight_rows(dataclasses.replace(config, adaptor=adaptor), "native")


def _native_tower(config: ModelConfig, flat: str, native: str) -> list[WeightRow]:
    """Rows of a tower by transformers' names; what DeepSeek-VL adds to SAM has other names and is not among them."""
    return [
        dataclasses.replace(row, keys=tuple(key.removeprefix(native) for key in row.keys))
        for row in _native_rows(config)
        if row.flat.startswith(flat) and all(key.startswith(native) for key in row.keys)
    ]


def _same_names(config: ModelConfig, flat: str) -> list[WeightRow]:
    """Rows of a tower whose public names are the released model's."""
    shapes = flat_shapes(config)
    return [
        WeightRow(name, shape, (name.removeprefix(flat),), Copy())
        for name, shape in shapes.items()
        if name.startswith(flat)
    ]


def _pool_rows(config: ModelConfig) -> dict[str, WeightRow]:
    """The attention pool by what stands after `attn_pool.`."""
    return {
        dead.key.partition(_POOL)[2]: WeightRow(dead.key, dead.shape, (dead.key,), Copy())
        for dead in dead_tensors(config)
        if _POOL in dead.key
    }


def _pool_tensors(
    tensors: StoredTensors,
    pool: Mapping[str, tuple[str, tuple[int, int] | None]],
    *,
    config: ModelConfig,
    prefix: str,
    dtype: torch.dtype,
) -> dict[str, TakenTensor]:
    """The attention pool where the source has one: DeepSeek-VL never runs it, but the release keeps it."""
    if not any(prefix + key in tensors for key, _ in pool.values()):
        return {}
    rows = _pool_rows(config)
    expected = {}
    for name, (key, thirds) in pool.items():
        first, *rest = rows[name].shape
        expected[prefix + key] = rows[name].shape if thirds is None else (3 * first // (thirds[1] - thirds[0]), *rest)
    found = {key: tensors[key] for key in expected if key in tensors}
    require_exactly(expected, found=found, locate=tensors.locate, wanted=f"preset {config.preset}")
    return {
        rows[name].flat: TakenTensor(row=rows[name], parts=(tensors[prefix + key],), dtype=dtype, thirds=thirds)
        for name, (key, thirds) in pool.items()
    }


def _check_tower(path: Path, config: ModelConfig, tower: str) -> None:
    """Sizes in a folder's `config.json`; the number of heads shows nowhere else."""
    where = path / "config.json"
    if not where.is_file():
        return
    raw = read_json(where)
    read, defaults = (read_siglip, SIGLIP_DEFAULTS) if tower == "siglip" else (read_sam, SAM_DEFAULTS)
    whole, alone = tower, f"{tower}_vision_model"
    if raw.get("model_type") not in (whole, alone):
        raise CheckpointError(f"{where}: model_type {raw.get('model_type')!r}, expected {whole} or {alone}")
    top = Fields(raw, where=where, path="", defaults=defaults)
    fields = top if raw["model_type"] == alone else top.child("vision_config", defaults=defaults)
    _require_sizes(read(fields), config, tower, where)


def _require_sizes(found: dict[str, Any], config: ModelConfig, part: str, where: Path) -> None:
    wanted = dataclasses.asdict(getattr(config, part))
    for name, value in found.items():
        value = tuple(value) if isinstance(value, list) else value
        # How long a context the model promises and how it is initialised do not change the weights.
        if name not in ("max_position_embeddings", "init_std") and value != wanted[name]:
            raise CheckpointError(
                f"{where}: gives {name} {value}, preset {config.preset} has model.{part}.{name} {wanted[name]}; "
                "give the model of that size, or another preset"
            )
