"""Reads the pickled parts of a checkpoint without letting a file run code.

An unpickler reads `.metadata` and allows only the few names that torch and megatron-core 0.16.1 write there. The
weights-only loader of torch reads tensors, byte objects and `common.pt`. Any other name is an error that states
the name.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from enum import Enum
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megavl.checkpoint.archive import Archive, FilePart, check_archive
from megavl.checkpoint.pickle_guard import GET_MEMBER, MAX_BYTES, Names, check_pickle
from megavl.config.errors import CheckpointError, one_line
from megavl.foreign.parsing import read_json
from megavl.foreign.reading import open_regular, read_limited, regular_file_in

METADATA = ".metadata"
COMMON = "common.pt"
BACKEND = "metadata.json"
BACKEND_MARK = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core 0.16.1 writes into `metadata.json`, its mark of a complete checkpoint."""

_NAMES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "torch": (
        torch,
        ("Size", "float32", "bfloat16", "float16", "float64", "int32", "int64", "uint8", "bool"),
    ),
    "torch.serialization": (torch.serialization, ("_get_layout",)),
    "torch.distributed.checkpoint.filesystem": (filesystem, ("_StorageInfo",)),
    "torch.distributed.checkpoint.metadata": (
        metadata,
        (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
    ),
    "torch.distributed.checkpoint.planner": (planner, ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}
_ENUMS = frozenset({"_MEM_FORMAT_ENCODING", "WriteItemType"})


def _member(enum: type[Enum], name: str) -> Enum:
    """A member by its name; stands in for `getattr`."""
    if not (isinstance(enum, type) and issubclass(enum, Enum)):
        raise TypeError(f"{enum} is no enum")
    return enum[name]


_ALLOWED = {
    GET_MEMBER: _member,
    **{(module, name): getattr(owner, name) for module, (owner, names) in _NAMES.items() for name in names},
}
_METADATA_NAMES = Names(
    known=frozenset(_ALLOWED),
    called=frozenset({"Size", "_get_layout", GET_MEMBER[1], *_ENUMS}),
    made=frozenset(
        name
        for module in ("filesystem", "metadata", "planner")
        for name in _NAMES[f"torch.distributed.checkpoint.{module}"][1]
        if name not in _ENUMS
    ),
    tuple_state=frozenset({"TensorProperties"}),
    enums=_ENUMS,
)
_MAX_AXES = 16
_MAX_SIZE = 1 << 60
_SHOWN = 100
_REFUSED_BY_TORCH = re.compile(r"GLOBAL ([\w.]+)")


class _AllowListUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], *, source: str) -> None:
        super().__init__(stream)
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise CheckpointError(f"refused global {module}.{name} in {self._source}; do not trust this file") from None


def read_metadata(path: Path) -> Metadata:
    """Read `.metadata` of a checkpoint directory, and check that the files can hold what it lists.

    Raises:
        CheckpointError: a name in the pickle that is not allowed, or an entry that points outside its file.
    """
    source = path / METADATA
    try:
        raw = read_limited(source, limit=MAX_BYTES)
        check_pickle(raw, names=_METADATA_NAMES, source=str(source))
        found = _AllowListUnpickler(io.BytesIO(raw), source=str(source)).load()
        check_metadata(path, found)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{source}: not readable ({type(error).__name__}: {one_line(error)})") from error
    return found  # type: ignore[no-any-return]


def read_common(path: Path) -> dict[str, Any]:
    """Read `common.pt`, the part of the state that all ranks share."""
    source = path / COMMON
    try:
        with open_regular(source, buffered=True) as stream:
            common = safe_load(stream, source=str(source))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: not readable ({one_line(error)})") from error
    if not isinstance(common, dict):
        raise CheckpointError(f"{source}: holds a {type(common).__name__}, expected a mapping")
    return common


def require_readable(path: Path) -> Metadata:
    """Read what every load reads besides shards: the marks of the format, `common.pt`, and `.metadata`.

    Returns:
        Content of `.metadata`.

    Raises:
        CheckpointError: a load of this checkpoint would fail.
    """
    check_backend(path)
    read_common(path)
    return read_metadata(path)


def check_backend(path: Path) -> None:
    """Check that the directory has the one format that this package reads (`torch_dist`, version 1)."""
    source = path / BACKEND
    try:
        mark = read_json(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: not readable ({one_line(error)})") from error
    if mark != BACKEND_MARK:
        raise CheckpointError(f"{source}: {str(mark)[:200]}, this program reads {BACKEND_MARK}")


def safe_load(
    file: IO[bytes] | Path, *, source: str, mmap: bool = False, checked: bool = False, remedy: str = ""
) -> Any:
    """`torch.load` of tensors and plain containers only.

    Args:
        file: archive of `torch.save`.
        mmap: map the file instead of reading it; needs a path.
        checked: `check_archive` has seen this file already.
        remedy: end of the message about damaged bytes.

    Raises:
        CheckpointError: "refused global MODULE.NAME in SOURCE", or the bytes are damaged.
    """
    try:
        if not checked:
            _check_file(file, source=source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{remedy}") from None
    except Exception as error:  # a damaged archive raises RuntimeError, EOFError, IndexError, ...
        match = _REFUSED_BY_TORCH.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and match:
            raise CheckpointError(f"refused global {match[1]} in {source}; do not trust this file") from error
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{source}: not readable ({reason}){remedy}") from error


def _check_file(file: IO[bytes] | Path, *, source: str) -> None:
    if isinstance(file, Path):
        with open_regular(file) as stream:
            _check_file(stream, source=source)
        return
    check_archive(FilePart(file=file, start=0, size=file.seek(0, os.SEEK_END), source=source))
    file.seek(0)


def check_shard_item(stream: IO[bytes], info: Any, *, source: str) -> Archive:
    """Check the item at (offset, length) of an open shard file, as `load_shard_item` does first."""
    return check_archive(FilePart(file=stream, start=info.offset, size=info.length, source=source))


def load_shard_item(stream: IO[bytes], info: Any, *, source: str) -> Any:
    """Load the item at (offset, length) of an open shard file."""
    check_shard_item(stream, info, source=source)
    view = _create_file_view(cast(io.IOBase, stream), info.offset, info.length)
    return safe_load(cast(IO[bytes], view), source=source, checked=True)


def check_metadata(path: Path, found: Any) -> None:
    """Reject impossible metadata before any memory is taken or file opened because of it.

    Raises:
        CheckpointError: naming the first entry whose blocks are not in the files, or are not the whole tensor.
    """
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path / METADATA}: holds a {type(found).__name__}, expected Metadata")
    sizes: dict[str, int] = {}
    for index, info in found.storage_data.items():
        name = info.relative_path
        if not _is_index(index) or not _is_size(info.offset) or not _is_size(info.length):
            raise CheckpointError(f"{path / METADATA}: damaged, an entry of storage_data has values of a wrong type")
        if name not in sizes:
            if not isinstance(name, str) or not name.endswith(".distcp") or Path(name).name != name:
                raise CheckpointError(f"{path / METADATA}: refused file name {repr(name)[:_SHOWN]} of {index.fqn}")
            sizes[name] = _size(path, name)
        if info.transform_descriptors:
            raise CheckpointError(f"{path / METADATA}: {index.fqn} is stored in a transformed form")
        if info.offset + info.length > sizes[name]:
            raise CheckpointError(f"{path / name}: {sizes[name]} bytes, {index.fqn} needs {info.offset + info.length}")
    for key, entry in found.state_dict_metadata.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path / METADATA}: damaged, a key is a {type(key).__name__}")
        _check_entry(path, key, entry, found.storage_data)


def _check_entry(path: Path, key: str, entry: Any, stored: Mapping[Any, Any]) -> None:
    if isinstance(entry, BytesStorageMetadata):
        if metadata.MetadataIndex(key) not in stored:
            raise CheckpointError(f"{path / METADATA}: {key} is not in the files")
        return
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"{path / METADATA}: {key} is a {type(entry).__name__}")
    if not _is_shape(entry.size):
        raise CheckpointError(f"{path / METADATA}: {key}: the shape is {repr(entry.size)[:_SHOWN]}")
    held = 0
    for chunk in entry.chunks:
        info = stored.get(metadata.MetadataIndex(key, chunk.offsets))
        if not _is_shape(chunk.offsets) or not _is_shape(chunk.sizes):
            raise CheckpointError(f"{path / METADATA}: {key}: a chunk has offsets or sizes that are no shape")
        elements = prod(chunk.sizes)
        if info is None or elements * entry.properties.dtype.itemsize > info.length:
            raise CheckpointError(f"{path / METADATA}: {key}: chunk at {list(chunk.offsets)} is not in the files")
        if any(o < 0 or o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)):
            raise CheckpointError(f"{path / METADATA}: {key}: chunk at {list(chunk.offsets)} lies outside {entry.size}")
        held += elements
    if held != prod(entry.size):
        raise CheckpointError(f"{path / METADATA}: {key}: {held} of {prod(entry.size)} elements are in the files")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= _MAX_AXES and all(map(_is_size, value))


def _is_index(index: Any) -> bool:
    return isinstance(index.fqn, str) and (index.offset is None or _is_shape(index.offset))


def _size(path: Path, name: str) -> int:
    try:
        file = regular_file_in(path, name)
        if file is None:
            raise FileNotFoundError("no such file")
        return file.stat().st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / name}: not readable ({one_line(error)})") from error
