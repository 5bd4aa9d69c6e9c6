"""Reads safetensors files one tensor at a time, and the JSON files that belong to them. Nothing here can run code."""

from __future__ import annotations

import os
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavl.config.errors import CheckpointError, one_line
from megavl.foreign import parsing
from megavl.foreign.parsing import JSON_FILE, Limit, parse_json
from megavl.foreign.reading import open_regular, regular_file_in
from megavl.weights.canonical_names import Shape
from megavl.weights.dtypes import DTYPE_OF_CODE


class SafetensorsFile:
    """One file, whose header the safetensors library has checked; values are read on demand.

    Values are read with plain reads, not through a memory map as in the library. Every page of a map that was read
    counts as memory of the process, and its first touch costs more than copying it.

    Raises:
        CheckpointError: the file is missing, truncated or not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > JSON_FILE.size:
                    raise ValueError(f"a header of {length:,} bytes, at most {JSON_FILE.size:,} are read")
                self._header: dict[str, Any] = parse_json(file.read(length))
            with safe_open(str(path), framework="pt", device="cpu") as checked:
                self.names = tuple(checked.keys())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file; the folder is incomplete, fetch it again") from error
        except (OSError, SafetensorError, struct.error, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({one_line(error, limit=300)}); it is truncated or damaged, "
                "fetch it again"
            ) from error
        self._start = 8 + length

    def describe(self, name: str) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of one tensor, from the header."""
        entry = self._header[name]
        dtype = DTYPE_OF_CODE.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {entry['dtype']}; "
                f"weights are one of {', '.join(DTYPE_OF_CODE)}"
            )
        return tuple(entry["shape"]), dtype

    def load(self, name: str) -> Tensor:
        """Values of one tensor, in memory of their own."""
        shape, dtype = self.describe(name)
        return self._read(name, torch.empty(shape, dtype=dtype), skip=0)

    def load_slice(self, name: str, start: int, stop: int, *, axis: int) -> Tensor:
        """The indices `start` to `stop` of an axis, in memory of their own; of rows, only their bytes are read."""
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


def read_json(path: Path, *, limit: Limit = JSON_FILE) -> dict[str, Any]:
    """Read a JSON object from a file of a folder.

    Raises:
        CheckpointError: the file is missing, a link that leaves its folder, beyond the limit, or holds anything else.
    """
    try:
        regular_file_in(path.parent, path.name)
        content = parsing.read_json(path, limit=limit)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the folder is incomplete") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({one_line(error, limit=400)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that a folder may lack; empty if nothing has that name.

    Raises:
        CheckpointError: as `read_json`, also for a FIFO, a device or a folder of that name.
    """
    return read_json(path) if os.path.lexists(path) else {}


def _fill(file: Any, target: memoryview) -> int:
    """Read until the target is full or the file ends; one read of the system returns at most 2 GiB."""
    done = 0
    while done < len(target) and (count := file.readinto(target[done:])):
        done += count
    return done
