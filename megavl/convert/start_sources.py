"""The three public models that a DeepSeek-VL starts from, each read as the part of the model that it becomes.

| model | layouts | recognised by a name that ends with the |
|---|---|---|
| DeepSeek-LLM | transformers' `LlamaForCausalLM` | - |
| SigLIP | timm and open_clip; transformers' `SiglipModel`, `SiglipVisionModel` | patch embedding |
| SAM | segment-anything; transformers' `SamModel`, `SamVisionModel` | patch embedding |

The text before that ending is the tower's prefix, such as `visual.trunk.`, `vision_model.`, `image_encoder.` or none.
Tensors without the prefix belong to other parts of the same model and are left out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError
from megavl.config.model import AdaptorConfig, ModelConfig
from megavl.convert.adaptors import NATIVE_DEPTH, NATIVE_KINDS
from megavl.convert.hf_read import DERIVED
from megavl.convert.language import Fields, read_llama, ties_head
from megavl.convert.native_format import SAM_DEFAULTS, SIGLIP_DEFAULTS, read_sam, read_siglip
from megavl.convert.safetensors_in import read_json
from megavl.convert.table import (
    EMBEDDING,
    HEAD,
    NATIVE_SIGLIP,
    POOL,
    POOL_PREFIX,
    WeightRow,
    unused_parameters,
    weight_rows,
)
from megavl.convert.transforms import Copy
from megavl.convert.weight_files import StoredTensors, open_folder, open_source
from megavl.files.model_folders import require_whole_model
from megavl.weights.canonical_names import canonical_shapes
from megavl.weights.dtypes import cast
from megavl.weights.lazy import LazyTensor, require_exactly

_NATIVE_SAM = "model.high_res_vision_model.vision_encoder."
_SIGLIP_ENDS = {"timm": "patch_embed.proj.weight", "transformers": "embeddings.patch_embedding.weight"}
_SAM_ENDS = {"segment-anything": "patch_embed.proj.weight", "transformers": "patch_embed.projection.weight"}


@dataclass(frozen=True, kw_only=True)
class StartSource:
    """The tensors that come from one public model."""

    path: Path
    tensors: dict[str, LazyTensor]
    """By canonical name."""
    unused: dict[str, LazyTensor]
    """Unused parameters of the original format by original name: SigLIP's attention pool, where the source has it."""
    origins: dict[str, list[dict[str, str]]]
    """File and name of the parts of every tensor, by the names in `tensors` and `unused`."""
    left_out: int
    """Number of tensors that belong to other parts of the same model."""


def read_llm(folder: Path, *, config: ModelConfig, dtype: torch.dtype) -> StartSource:
    """Open a language model in LLaMA format.

    Args:
        folder: `config.json` and weights as transformers saves them.
        config: sizes that the source must have.

    Raises:
        CheckpointError: other sizes; a missing, unexpected or misshapen tensor; a damaged or hostile file.
    """
    where = folder / "config.json"
    require_whole_model(folder)
    raw = read_json(where)
    _require_sizes(read_llama(raw, where=where), config, "llm", where)
    tensors = open_folder(folder)
    if ties_head(Fields(raw, where=where, path="", defaults={})):
        tensors.tie(HEAD, to=f"model.{EMBEDDING}")
    rows = list(weight_rows(config, "llm"))
    ignored = [name for name in tensors if name.endswith(DERIVED)]
    return _source(folder, tensors, rows, config=config, dtype=dtype, prefix="", ignored=ignored)


def read_siglip_tower(path: Path, *, config: ModelConfig, dtype: torch.dtype) -> StartSource:
    """Open a SigLIP image tower in any of the layouts above; a text tower in the same file is left out.

    Args:
        path: weight file, or folder with one set of weights.
        config: sizes that the source must have.

    Raises:
        CheckpointError: as `read_llm`, or no tower is found.
    """
    tensors = open_source(path)
    layout, prefix = _layout(tensors, _SIGLIP_ENDS, "SigLIP")
    pool: dict[str, tuple[str, tuple[int, int] | None]]
    if layout == "timm":
        rows = _same_names(config, "vision.siglip.")
        pool = {name: (POOL_PREFIX + name, None) for name in _pool_rows(config)}
    else:
        _check_tower(path, config, "siglip")
        rows = _native_tower(config, "vision.siglip.", NATIVE_SIGLIP)
        pool = {
            name.replace("*", kind): (key.replace("*", kind), thirds)
            for name, key, thirds, _ in POOL
            for kind in (("weight", "bias") if "*" in name else ("",))
        }
    ignored = [prefix + key for key, _ in pool.values()]
    ignored += [name for name in tensors if name.endswith(DERIVED)]
    source = _source(path, tensors, rows, config=config, dtype=dtype, prefix=prefix, ignored=ignored)
    keys = _pool_keys(tensors, pool, config=config, prefix=prefix)
    pool_rows = _pool_rows(config)
    unused = {
        pool_rows[name].name: _taken(pool_rows[name], tensors, [key], dtype=dtype, thirds=pool[name][1])
        for name, key in keys.items()
    }
    origins = {pool_rows[name].name: _origin(tensors, [key]) for name, key in keys.items()}
    return dataclasses.replace(source, unused=unused, origins=source.origins | origins)


def read_sam_tower(path: Path, *, config: ModelConfig, dtype: torch.dtype) -> StartSource:
    """Open a SAM image encoder in any of the layouts above; the rest of SAM is left out.

    Args:
        path: weight file, or folder with one set of weights.
        config: sizes that the source must have.

    Raises:
        CheckpointError: as `read_llm`, or no encoder is found.
    """
    tensors = open_source(path)
    layout, prefix = _layout(tensors, _SAM_ENDS, "SAM")
    if layout == "transformers":
        _check_tower(path, config, "sam")
    rows = _native_tower(config, "vision.sam.", _NATIVE_SAM)
    if layout == "segment-anything":
        public = {row.name for row in rows}
        rows = [row for row in _same_names(config, "vision.sam.") if row.name in public]
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
    return StartSource(
        path=path,
        tensors={row.name: _taken(row, tensors, [prefix + key for key in row.keys], dtype=dtype) for row in rows},
        unused={},
        origins={row.name: _origin(tensors, [prefix + key for key in row.keys]) for row in rows},
        left_out=len(tensors) - len(found),
    )


def _taken(
    row: WeightRow,
    tensors: StoredTensors,
    keys: list[str],
    *,
    dtype: torch.dtype,
    thirds: tuple[int, int] | None = None,
) -> LazyTensor:
    """A parameter made of tensors of a source.

    Args:
        keys: names in the source, in the order that the transform takes them.
        dtype: type of the result; the parts may have others.
        thirds: first and last third of the rows of the only part; None for all rows.
    """
    # A part of an integer type is refused here, before anything is written.
    parts = {key: tensors[key] for key in keys}

    def load() -> Tensor:
        values = [cast(part.load(), dtype, name=key, source=tensors.locate(key)) for key, part in parts.items()]
        if thirds is None:
            return row.transform.to_canonical(values)
        first, last = (len(values[0]) // 3 * third for third in thirds)
        return values[0][first:last].clone()

    return LazyTensor(shape=row.shape, dtype=dtype, load=load)


def _origin(tensors: StoredTensors, keys: list[str]) -> list[dict[str, str]]:
    return [{"file": str(Path(tensors.locate(key)).absolute()), "tensor": tensors.stored_name(key)} for key in keys]


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


def _native_tower(config: ModelConfig, prefix: str, native: str) -> list[WeightRow]:
    """Rows of a tower by transformers' names, without the parts that DeepSeek-VL adds to SAM."""
    return [
        dataclasses.replace(row, keys=tuple(key.removeprefix(native) for key in row.keys))
        for row in _native_rows(config)
        if row.name.startswith(prefix) and all(key.startswith(native) for key in row.keys)
    ]


def _same_names(config: ModelConfig, prefix: str) -> list[WeightRow]:
    """Rows of a tower whose public names equal those of the released model."""
    shapes = canonical_shapes(config)
    return [
        WeightRow(name, shape, (name.removeprefix(prefix),), Copy())
        for name, shape in shapes.items()
        if name.startswith(prefix)
    ]


def _pool_rows(config: ModelConfig) -> dict[str, WeightRow]:
    """Rows of the attention pool by the part of the name after `attn_pool.`."""
    return {
        unused.key.partition(POOL_PREFIX)[2]: WeightRow(unused.key, unused.shape, (unused.key,), Copy())
        for unused in unused_parameters(config)
        if POOL_PREFIX in unused.key
    }


def _pool_keys(
    tensors: StoredTensors,
    pool: Mapping[str, tuple[str, tuple[int, int] | None]],
    *,
    config: ModelConfig,
    prefix: str,
) -> dict[str, str]:
    """Names of the attention pool in a source that has one: DeepSeek-VL never runs it, but the release keeps it."""
    keys = {name: prefix + key for name, (key, _) in pool.items()}
    if not any(key in tensors for key in keys.values()):
        return {}
    rows = _pool_rows(config)
    expected = {}
    for name, (_, thirds) in pool.items():
        first, *rest = rows[name].shape
        expected[keys[name]] = rows[name].shape if thirds is None else (3 * first // (thirds[1] - thirds[0]), *rest)
    found = {key: tensors[key] for key in expected if key in tensors}
    require_exactly(expected, found=found, locate=tensors.locate, wanted=f"preset {config.preset}")
    return keys


def _check_tower(path: Path, config: ModelConfig, tower: str) -> None:
    """Compare the sizes in a folder's `config.json`; no shape shows the number of heads."""
    where = path / "config.json"
    if not os.path.lexists(where):
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
        # Context length and initialisation do not change the weights.
        if name not in ("max_position_embeddings", "init_std") and value != wanted[name]:
            raise CheckpointError(
                f"{where}: gives {name} {value}, preset {config.preset} has model.{part}.{name} {wanted[name]}; "
                "give the model of that size, or another preset"
            )
