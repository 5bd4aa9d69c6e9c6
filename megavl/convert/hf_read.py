"""A Hugging Face folder in either format, read as a MegaVL model: its sizes, and its parameters one at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megavl.config.errors import CheckpointError
from megavl.config.identity import with_own_preset
from megavl.config.model import ModelConfig
from megavl.convert import llm_format, native_format, original_format
from megavl.convert.image_files import check_normalisation
from megavl.convert.language import Fields, ties_head
from megavl.convert.safetensors_in import read_json, read_optional_json
from megavl.convert.table import (
    HEAD,
    NATIVE_EMBEDDING,
    NATIVE_SIGLIP,
    NATIVE_SIGLIP_UNNESTED,
    Format,
    WeightRow,
    native_pool_keys,
    unused_parameters,
    weight_rows,
)
from megavl.convert.weight_files import StoredTensors, open_folder
from megavl.files.model_folders import require_whole_model
from megavl.weights.lazy import LazyTensor, require_exactly

DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of the names of buffers that old versions saved; their values follow from the configuration."""


def is_hf_folder(path: str | Path) -> bool:
    """Whether a folder has the `config.json` of a Hugging Face model."""
    return os.path.lexists(Path(path) / "config.json")


def read_config(folder: str | Path) -> tuple[ModelConfig, Format]:
    """Sizes and format of a Hugging Face folder; `auto_map` and other pointers to code are ignored.

    Raises:
        CheckpointError: names config.json and the field that MegaVL cannot represent.
    """
    path = Path(folder) / "config.json"
    require_whole_model(path.parent)
    raw = read_json(path)
    check_normalisation(path.parent)
    model_type = raw.get("model_type")
    if model_type in native_format.MODEL_TYPES:
        return _completed(native_format.read_config(raw, where=path), raw, "text_config", where=path), "native"
    if model_type == original_format.MODEL_TYPE:
        return _completed(original_format.read_config(raw, where=path), raw, "language_config", where=path), "original"
    remedy = (
        "; `megavl convert init --llm` makes start weights of a language model"
        if model_type == llm_format.MODEL_TYPE
        else ""
    )
    raise CheckpointError(
        f"{path}: model_type {model_type!r} is not a DeepSeek-VL model; expected one of "
        f"{', '.join((*native_format.MODEL_TYPES, original_format.MODEL_TYPE))}{remedy}"
    )


def read_llm_config(folder: str | Path) -> ModelConfig | None:
    """Sizes of a folder with a decoder alone; None if it holds another model. See `llm_format.read_config`."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != llm_format.MODEL_TYPE:
        return None
    return _completed(llm_format.read_config(raw, where=path), raw, "", where=path)


def _completed(config: ModelConfig, raw: dict[str, Any], part: str, *, where: Path) -> ModelConfig:
    """Sizes with what else a file says about prompts and answers."""
    system = raw.get("system_prompt")
    if system is not None and not isinstance(system, str):
        raise CheckpointError(f"{where}: system_prompt: a text is expected, found {str(system)[:200]}")
    config = _with_eos(config, raw, part, where=where)
    return config if system is None else dataclasses.replace(config, system_prompt=system)


def _with_eos(config: ModelConfig, raw: dict[str, Any], part: str, *, where: Path) -> ModelConfig:
    """Add the ids that end an answer if there are several; a single one is the tokenizer's EOS.

    As in transformers, `generation_config.json` goes before the top level of `config.json`, and this before the
    language model's part.
    """
    generation, inner = where.with_name("generation_config.json"), raw.get(part)
    places = [
        (generation, "eos_token_id", read_optional_json(generation)),
        (where, "eos_token_id", raw),
        (where, f"{part}.eos_token_id", inner if isinstance(inner, dict) else {}),
    ]
    file, key, found = next((place for place in places if place[2].get("eos_token_id") is not None), places[-1])
    ids = found.get("eos_token_id")
    if ids is not None and type(ids) not in (int, list):
        raise CheckpointError(f"{file}: {key}: an id or a list of ids is expected, found {str(ids)[:200]}")
    if not isinstance(ids, list) or len(set(map(str, ids))) < 2:
        return config
    vocabulary = config.llm.vocab_size
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise CheckpointError(f"{file}: {key}: ids below vocab_size {vocabulary} are expected, found {str(ids)[:200]}")
    return with_own_preset(dataclasses.replace(config, eos_token_ids=tuple(ids)))


def open_hf_tensors(folder: str | Path) -> StoredTensors:
    """Tensors of a Hugging Face folder by the names that its files give them.

    Where `tie_word_embeddings` makes embedding and head one matrix, the head is the embedding under a second name.

    Raises:
        CheckpointError: a hostile, damaged or missing file, an index that leaves the folder.
    """
    folder = Path(folder)
    tensors = open_folder(folder)
    where = folder / "config.json"
    top = Fields(read_json(where), where=where, path="", defaults={})
    original = top.get("model_type") == original_format.MODEL_TYPE
    part, prefix = ("language_config", "language_model.") if original else ("text_config", "")
    head, embedding = f"{prefix}{HEAD}", prefix + ("model.embed_tokens.weight" if original else NATIVE_EMBEDDING)
    # transformers 4.57 looks into the language model's part alone. A file without a head that the top level ties would
    # get a random one there.
    if ties_head(top.child(part, defaults={})) or (ties_head(top) and head not in tensors):
        tensors.tie(head, to=embedding)
    return tensors


def canonical_tensors(tensors: StoredTensors, *, config: ModelConfig, fmt: Format) -> dict[str, LazyTensor]:
    """Parameters of the model by canonical name; names and shapes are checked here, values are read later.

    The native format names SigLIP's tensors nested or unnested; both are understood.

    Raises:
        CheckpointError: names the file and the missing, unexpected or misshapen tensor, or the parts of one parameter
            that have different types.
    """
    names = _actual_names(tensors, fmt)
    rows = weight_rows(config, fmt)
    expected = {names.get(key, key): shape for row in rows for key, shape in row.key_shapes.items()}
    require_exactly(expected, found=tensors, locate=tensors.locate, ignored=_ignored(tensors, names, config, fmt))
    found = {}
    for row in rows:
        keys = [names.get(key, key) for key in row.keys]
        parts = [tensors[key] for key in keys]
        for key, part in zip(keys, parts):
            if part.dtype != parts[0].dtype:
                raise CheckpointError(
                    f"{tensors.locate(key)}: tensor {key!r} is {part.dtype}, but {keys[0]!r} is {parts[0].dtype}; "
                    "MegaVL stores them as one tensor, save both in one type"
                )
        found[row.name] = _joined(row, parts)
    return found


def _joined(row: WeightRow, parts: list[LazyTensor]) -> LazyTensor:
    """A parameter that is put together from tensors of a file when it is loaded."""

    def load_slice(start: int, stop: int, *, axis: int) -> Tensor:
        if axis:
            # Parts are joined along their rows, so columns are the same in all of them.
            return row.transform.to_canonical([part.load_slice(start, stop, axis=axis) for part in parts])
        return row.transform.rows_to_canonical([part.load_slice for part in parts], row.shape, start, stop)

    return LazyTensor(
        shape=row.shape,
        dtype=parts[0].dtype,
        load=lambda: row.transform.to_canonical([part.load() for part in parts]),
        slicer=load_slice,
    )


def read_unused(tensors: StoredTensors, *, config: ModelConfig, fmt: Format) -> dict[str, LazyTensor]:
    """Unused parameters of the original format that the file holds, by their original names, for a later export.

    Raises:
        CheckpointError: such a tensor has another shape.
    """
    if fmt == "native":
        return {}
    shapes = {unused.key: unused.shape for unused in unused_parameters(config) if unused.key in tensors}
    found = {name: tensors[name] for name in shapes}
    require_exactly(shapes, found=found, locate=tensors.locate)
    return found


def _actual_names(tensors: StoredTensors, fmt: Format) -> dict[str, str]:
    """Names of SigLIP tensors in a file that has them unnested, by their nested names."""
    names: dict[str, str] = {}
    if fmt == "original":
        return names
    for name in tensors:
        if not name.startswith(NATIVE_SIGLIP_UNNESTED) or name.startswith(NATIVE_SIGLIP):
            continue
        nested = NATIVE_SIGLIP + name.removeprefix(NATIVE_SIGLIP_UNNESTED)
        if nested in tensors:
            raise CheckpointError(f"{tensors.locate(name)}: holds both {name!r} and {nested!r}; keep one of them")
        names[nested] = name
    return names


def _ignored(tensors: StoredTensors, names: Mapping[str, str], config: ModelConfig, fmt: Format) -> set[str]:
    unused = {row.key for row in unused_parameters(config)} if fmt == "original" else native_pool_keys(config)
    derived = {name for name in tensors if name.endswith(DERIVED)}
    return {names.get(key, key) for key in unused} | derived
