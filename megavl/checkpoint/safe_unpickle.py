"""Reads the pickled parts of a checkpoint without letting a file run code.

An unpickler reads `.metadata` and allows only the few names that torch and megatron-core 0.16.1 write there. The
weights-only loader of torch reads tensors, byte objects and `common.pt`. Any other name is an error that states
the name.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megavl.config.errors import CheckpointError, one_line

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
_ALLOWED = {(module, name): getattr(owner, name) for module, (owner, names) in _NAMES.items() for name in names}
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
        with source.open("rb") as stream:
            found = _AllowListUnpickler(stream, source=str(source)).load()
        _check_metadata(path, found)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{source}: not readable ({type(error).__name__}: {one_line(error)})") from error
    return found  # type: ignore[no-any-return]


def read_common(path: Path) -> dict[str, Any]:
    """Read `common.pt`, the part of the state that all ranks share."""
    source = path / COMMON
    try:
        with source.open("rb") as stream:
            common = safe_load(stream, source=str(source))
    except OSError as error:
        raise CheckpointError(f"{source}: not readable ({error.strerror})") from error
    if not isinstance(common, dict):
        raise CheckpointError(f"{source}: holds a {type(common).__name__}, expected a mapping")
    return common


def check_backend(path: Path) -> None:
    """Check that the directory has the one format that this package reads (`torch_dist`, version 1)."""
    source = path / BACKEND
    try:
        mark = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: not readable ({one_line(error)})") from error
    if mark != BACKEND_MARK:
        raise CheckpointError(f"{source}: {str(mark)[:200]}, this program reads {BACKEND_MARK}")


def safe_load(file: IO[bytes] | Path, *, source: str, mmap: bool = False, remedy: str = "") -> Any:
    """`torch.load` of tensors and plain containers only.

    Args:
        file: archive of `torch.save`.
        mmap: map the file instead of reading it; needs a path.
        remedy: end of the message about damaged bytes.

    Raises:
        CheckpointError: "refused global MODULE.NAME in SOURCE", or the bytes are damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged archive raises RuntimeError, EOFError, IndexError, ...
        match = _REFUSED_BY_TORCH.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and match:
            raise CheckpointError(f"refused global {match[1]} in {source}; do not trust this file") from error
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{source}: not readable ({reason}){remedy}") from error


def load_shard_item(stream: IO[bytes], info: Any, *, source: str) -> Any:
    """Load the item at (offset, length) of an open shard file."""
    view = _create_file_view(cast(io.IOBase, stream), info.offset, info.length)
    return safe_load(cast(IO[bytes], view), source=source)


def _check_metadata(path: Path, found: Any) -> None:
    """Reject impossible metadata before any memory is taken or file opened because of it."""
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path / METADATA}: holds a {type(found).__name__}, expected Metadata")
    sizes: dict[str, int] = {}
    for index, info in found.storage_data.items():
        name = info.relative_path
        if name not in sizes:
            if not isinstance(name, str) or not name.endswith(".distcp") or Path(name).name != name:
                raise CheckpointError(f"{path / METADATA}: refused file name {name!r} of {index.fqn}")
            sizes[name] = _size(path / name)
        if info.transform_descriptors:
            raise CheckpointError(f"{path / METADATA}: {index.fqn} is transformed by {info.transform_descriptors}")
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise CheckpointError(f"{path / name}: {sizes[name]} bytes, {index.fqn} needs {info.offset + info.length}")
    for key, entry in found.state_dict_metadata.items():
        _check_entry(path, key, entry, found.storage_data)


def _check_entry(path: Path, key: str, entry: Any, stored: Mapping[Any, Any]) -> None:
    if isinstance(entry, BytesStorageMetadata):
        return
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"{path / METADATA}: {key} is a {type(entry).__name__}")
    held = 0
    for chunk in entry.chunks:
        info = stored.get(metadata.MetadataIndex(key, chunk.offsets))
        elements = chunk.sizes.numel()
        if info is None or elements * entry.properties.dtype.itemsize > info.length:
            raise CheckpointError(f"{path / METADATA}: {key}: chunk at {list(chunk.offsets)} is not in the files")
        if any(o < 0 or o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)):
            raise CheckpointError(f"{path / METADATA}: {key}: chunk at {list(chunk.offsets)} lies outside {entry.size}")
        held += elements
    if held != entry.size.numel():
        raise CheckpointError(f"{path / METADATA}: {key}: {held} of {entry.size.numel()} elements are in the files")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror})") from error
