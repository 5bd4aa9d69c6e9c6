"""Reading safetensors files of a Hugging Face folder, one tensor at a time and never anything that can run code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavl.config.errors import CheckpointError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFile:
    """One open file; the values stay on disk until a tensor is loaded.

    Raises:
        CheckpointError: naming the file, when it is missing, truncated or not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # The handle holds the memory map of the file and is closed with the last tensor that refers to it.
            handle: Any = safe_open(str(path), framework="pt", device="cpu")
            self._handle = handle
            self.names: tuple[str, ...] = tuple(handle.keys())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; the folder is incomplete, fetch it again") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}); it is truncated or damaged, fetch it again"
            ) from error

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor, from the header."""
        piece = self._handle.get_slice(name)
        dtype = _DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {piece.get_dtype()}; weights are one of {', '.join(_DTYPES)}"
            )
        return tuple(piece.get_shape()), dtype

    def load(self, name: str) -> Tensor:
        """Values of one tensor."""
        try:
            tensor: Tensor = self._handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot read tensor {name!r} ({error})") from error
        return tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: SafetensorsFile
    name: str
    """Name in the file."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape, from the header."""
        return self.file.describe(self.name)[0]

    @property
    def dtype(self) -> torch.dtype:
        """Element type, from the header."""
        return self.file.describe(self.name)[1]

    def load(self) -> Tensor:
        """Read the values."""
        return self.file.load(self.name)


class StoredTensors(Mapping[str, StoredTensor]):
    """Every tensor of one file or of one sharded set, by name."""

    def __init__(self, source: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.source = source
        """File that lists the names: the index, or the only file."""
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def locate(self, name: str) -> str:
        """Path of the file that holds a tensor, or that should list it."""
        return str(self._tensors[name].file.path if name in self._tensors else self.source)


def open_file(path: Path) -> StoredTensors:
    """Tensors of a single safetensors file."""
    file = SafetensorsFile(path)
    return StoredTensors(path, {name: StoredTensor(file, name) for name in file.names})


def open_folder(folder: Path) -> StoredTensors:
    """Tensors of a Hugging Face folder: `model.safetensors`, or the files of its index.

    Raises:
        CheckpointError: no safetensors weights, a damaged file, an index that leaves the folder or does not fit its
            files.
    """
    if (folder / _INDEX).is_file():
        return _open_sharded(folder)
    if (folder / _SINGLE).is_file():
        return open_file(folder / _SINGLE)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: refused, because a pickle can run code when it is opened; "
            f"save the weights as safetensors first (save_pretrained(..., safe_serialization=True))"
        )
    raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there; give a Hugging Face folder with weights")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: naming the file, when it is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the folder is incomplete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def _open_sharded(folder: Path) -> StoredTensors:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = SafetensorsFile(_inside(folder, shard, index))
        listed = {name for name, holder in weight_map.items() if holder == shard}
        absent, surplus = sorted(listed - set(file.names)), sorted(set(file.names) - listed)
        if absent:
            raise CheckpointError(f"{file.path}: no tensor {absent[0]!r}, which {index.name} places there")
        if surplus:
            raise CheckpointError(f"{file.path}: holds tensor {surplus[0]!r}, which {index.name} does not place there")
        tensors |= {name: StoredTensor(file, name) for name in listed}
    return StoredTensors(index, {name: tensors[name] for name in weight_map})


def _inside(folder: Path, name: str, index: Path) -> Path:
    # Checked by name only: the model cache of Hugging Face legitimately links its files to a place outside.
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in parts or "\\" in name:
        raise CheckpointError(f"{index}: weight_map names {name!r}, which lies outside the folder; refused")
    return folder / name
