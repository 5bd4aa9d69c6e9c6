"""Reading safetensors files, one tensor at a time and never anything that can run code; and JSON files beside them."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavl.config.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Element types of weights by their name in a header."""


class SafetensorsFile:
    """One file, whose header the safetensors library has checked; values are read when asked for.

    Values are read with plain reads: in a memory map of the file, as the library has it, every page that was read
    counts as memory of the process, and a first touch of each costs more than copying it.

    Raises:
        CheckpointError: naming the file, when it is missing, truncated or not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="pt", device="cpu") as checked:
                self.names = tuple(checked.keys())
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                self._header: dict[str, Any] = json.loads(file.read(length))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; the folder is incomplete, fetch it again") from error
        except (OSError, SafetensorError, struct.error, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}); it is truncated or damaged, fetch it again"
            ) from error
        self._start = 8 + length

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor, from the header."""
        entry = self._header[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {entry['dtype']}; weights are one of {', '.join(DTYPES)}"
            )
        return tuple(entry["shape"]), dtype

    def load(self, name: str) -> Tensor:
        """Values of one tensor, in memory of their own."""
        shape, dtype = self.describe(name)
        return self._read(name, torch.empty(shape, dtype=dtype), skip=0)

    def load_slice(self, name: str, start: int, stop: int, *, axis: int) -> Tensor:
        """What lies between two indices of an axis, in memory of its own; of rows, only their bytes are read."""
        shape, dtype = self.describe(name)
        if axis:
            return self.load(name).narrow(axis, start, stop - start).clone(memory_format=torch.contiguous_format)
        rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        return self._read(name, rows, skip=start * prod(shape[1:]) * dtype.itemsize)

    def _read(self, name: str, out: Tensor, *, skip: int) -> Tensor:
        target = out.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + self._header[name]["data_offsets"][0] + skip)
                read = _fill(file, target)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read tensor {name!r} ({error})") from error
        if read != len(target):
            raise CheckpointError(f"{self.path}: cannot read tensor {name!r}: the file has become shorter")
        return out


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


def _fill(file: Any, target: memoryview) -> int:
    """Read until the target is full or the file ends; one read of the system returns at most 2 GiB."""
    done = 0
    while done < len(target) and (count := file.readinto(target[done:])):
        done += count
    return done
