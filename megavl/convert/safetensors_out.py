"""Writes safetensors files one row of the weight table at a time, so that memory holds one tensor, not the model.

Format: eight bytes of header length, the header as JSON, then the tensors back to back
(https://github.com/huggingface/safetensors). Files are read back through the safetensors library only.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavl.files.durable import write_durably
from megavl.files.file_series import FileSeries
from megavl.weights.canonical_names import Shape
from megavl.weights.dtypes import CODE_OF_DTYPE

_STEM = "model"
_WRITTEN = re.compile(rf"{_STEM}(-[0-9]{{5,}}-of-[0-9]{{5,}}\.safetensors|\.safetensors(\.index\.json)?)")


@dataclass(frozen=True)
class OutputRow:
    """Tensors that come from one parameter and go into one file."""

    shapes: dict[str, Shape]
    dtype: torch.dtype
    load: Callable[[], Sequence[Tensor]]
    """The tensors in the order of `shapes`, each of type `dtype`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the row."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * self.dtype.itemsize


def is_weight_file(name: str) -> bool:
    """Whether a file of this name is one that `write_safetensors` writes: weights, a shard of them, or their index."""
    return _WRITTEN.fullmatch(name) is not None


def write_safetensors(folder: Path, rows: Iterable[OutputRow], *, max_shard_bytes: int) -> None:
    """Write rows as `model.safetensors`, or as numbered files with an index when they exceed `max_shard_bytes`.

    Every file is synced when this returns. A row larger than `max_shard_bytes` gets a file of its own.
    """
    shards = _split(rows, max_shard_bytes)
    names = [f"{_STEM}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{_STEM}.safetensors"]
    with FileSeries(folder, hashed=False) as files:
        for name, shard in zip(names, shards):
            files.begin(name)
            _write_shard(files, shard)
    if len(shards) == 1:
        return
    weight_map = {key: name for name, shard in zip(names, shards) for row in shard for key in row.shapes}
    total = sum(row.nbytes for shard in shards for row in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_durably(folder / f"{_STEM}.safetensors.index.json", json.dumps(index, indent=2).encode())


def _split(rows: Iterable[OutputRow], max_shard_bytes: int) -> list[list[OutputRow]]:
    shards: list[list[OutputRow]] = [[]]
    size = 0
    for row in rows:
        if shards[-1] and size + row.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += row.nbytes
    return shards


def _write_shard(files: FileSeries, rows: Sequence[OutputRow]) -> None:
    # Wide types first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(rows, key=lambda row: -row.dtype.itemsize)
    files.write(_header(ordered))
    for row in ordered:
        # A function of its own: its locals are freed before the next row is read.
        _write_row(files, row)


def _write_row(files: FileSeries, row: OutputRow) -> None:
    for (name, shape), tensor in zip(row.shapes.items(), row.load(), strict=True):
        assert tuple(tensor.shape) == shape and tensor.dtype == row.dtype, f"{name}: not as announced"
        files.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(rows: Sequence[OutputRow]) -> bytes:
    # transformers refuses files that do not name the framework.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for row in rows:
        for name, shape in row.shapes.items():
            end = offset + torch.Size(shape).numel() * row.dtype.itemsize
            header[name] = {"dtype": CODE_OF_DTYPE[row.dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
