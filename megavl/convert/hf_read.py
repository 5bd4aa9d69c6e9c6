"""A Hugging Face folder in either format, seen as a MegaVL model: sizes and flat tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError
from megavl.config.model import ModelConfig
from megavl.convert import native_format, original_format
from megavl.convert.lazy import LazyTensor, require_exactly
from megavl.convert.safetensors_in import read_json
from megavl.convert.table import (
    NATIVE_SIGLIP,
    NATIVE_SIGLIP_FLAT,
    Format,
    WeightRow,
    dead_tensors,
    native_pool_keys,
    weight_rows,
)
from megavl.convert.weight_files import StoredTensor, StoredTensors, open_folder

_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Ends of names of buffers that old versions saved and that follow from the configuration."""


def is_hf_folder(path: str | Path) -> bool:
    """Whether a folder has the `config.json` of a Hugging Face model."""
    return (Path(path) / "config.json").is_file()


def read_config(folder: str | Path) -> tuple[ModelConfig, Format]:
    """Sizes and format of a Hugging Face folder; `auto_map` and other pointers to code are never looked at.

    Raises:
        CheckpointError: naming config.json and the field that MegaVL cannot represent.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type in native_format.MODEL_TYPES:
        return native_format.read_config(raw, where=path), "native"
    if model_type == original_format.MODEL_TYPE:
        return original_format.read_config(raw, where=path), "original"
    raise CheckpointError(
        f"{path}: model_type {model_type!r} is not a DeepSeek-VL model; expected one of "
        f"{', '.join((*native_format.MODEL_TYPES, original_format.MODEL_TYPE))}"
    )


def open_hf_tensors(folder: str | Path) -> StoredTensors:
    """Tensors of a Hugging Face folder by the names that its files give them.

    Raises:
        CheckpointError: a hostile, damaged or missing file, an index that leaves the folder.
    """
    return open_folder(Path(folder))


@dataclass(frozen=True)
class FlatTensor:
    """A flat tensor put together from the tensors of a file when it is loaded."""

    row: WeightRow
    parts: tuple[StoredTensor, ...]

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the flat tensor."""
        return self.row.shape

    @property
    def dtype(self) -> torch.dtype:
        """Element type, the same in all parts."""
        return self.parts[0].dtype

    def load(self) -> Tensor:
        """Read the parts and join them."""
        return self.row.transform.to_flat([part.load() for part in self.parts])

    def load_slice(self, start: int, stop: int, *, axis: int = 0) -> Tensor:
        """Read what lies between two indices of an axis, of every part only what belongs there."""
        transform = self.row.transform
        if axis:
            # Parts are joined along their rows, so columns are the same in all of them.
            return transform.to_flat([part.load_slice(start, stop, axis=axis) for part in self.parts])
        return transform.rows_to_flat([part.load_slice for part in self.parts], self.row.shape, start, stop)


def flat_view(tensors: StoredTensors, *, config: ModelConfig, fmt: Format) -> dict[str, FlatTensor]:
    """Tensors of a file as flat tensors; all names and shapes are checked here, values are read later.

    Nested and flat SigLIP names of the native format are both understood.

    Raises:
        CheckpointError: a missing, unexpected or misshapen tensor, or parts of one flat tensor of different types,
            naming file and tensor.
    """
    names = _actual_names(tensors, fmt)
    rows = weight_rows(config, fmt)
    expected = {names.get(key, key): shape for row in rows for key, shape in row.key_shapes.items()}
    require_exactly(expected, found=tensors, locate=tensors.locate, ignored=_ignored(tensors, names, config, fmt))
    view = {}
    for row in rows:
        parts = tuple(tensors[names.get(key, key)] for key in row.keys)
        odd = next((part for part in parts if part.dtype != parts[0].dtype), None)
        if odd is not None:
            raise CheckpointError(
                f"{odd.file.path}: tensor {odd.name!r} is {odd.dtype}, but {parts[0].name!r} is {parts[0].dtype}; "
                "MegaVL stores them as one tensor, save both in one type"
            )
        view[row.flat] = FlatTensor(row, parts)
    return view


def to_flat(tensors: StoredTensors, *, config: ModelConfig, fmt: Format) -> Iterator[tuple[str, Tensor]]:
    """Flat names and tensors, one at a time; everything is checked before the first one is read.

    Raises:
        CheckpointError: as `flat_view`.
    """
    view = flat_view(tensors, config=config, fmt=fmt)
    return ((name, tensor.load()) for name, tensor in view.items())


def read_passthrough(tensors: StoredTensors, *, config: ModelConfig, fmt: Format) -> dict[str, LazyTensor]:
    """Dead tensors of the original format that the file holds, by their original names, to be written back one day.

    Raises:
        CheckpointError: a dead tensor of another shape.
    """
    if fmt == "native":
        return {}
    shapes = {dead.key: dead.shape for dead in dead_tensors(config) if dead.key in tensors}
    found: dict[str, LazyTensor] = {name: tensors[name] for name in shapes}
    require_exactly(shapes, found=found, locate=tensors.locate)
    return found


def _actual_names(tensors: StoredTensors, fmt: Format) -> dict[str, str]:
    """Names in the file of SigLIP tensors stored in the flat layout, by their nested names."""
    names: dict[str, str] = {}
    if fmt == "original":
        return names
    for name in tensors:
        if not name.startswith(NATIVE_SIGLIP_FLAT) or name.startswith(NATIVE_SIGLIP):
            continue
        nested = NATIVE_SIGLIP + name.removeprefix(NATIVE_SIGLIP_FLAT)
        if nested in tensors:
            raise CheckpointError(f"{tensors.locate(name)}: holds both {name!r} and {nested!r}; keep one of them")
        names[nested] = name
    return names


def _ignored(tensors: StoredTensors, names: Mapping[str, str], config: ModelConfig, fmt: Format) -> set[str]:
    dead = {row.key for row in dead_tensors(config)} if fmt == "original" else native_pool_keys(config)
    derived = {name for name in tensors if name.endswith(_DERIVED)}
    return {names.get(key, key) for key in dead} | derived
