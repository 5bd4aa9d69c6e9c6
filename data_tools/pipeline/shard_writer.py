"""Writes one shard: token and image pairs, tables, and last the manifest, which commits it."""

from __future__ import annotations

import io
import struct
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.pipeline.image_source import LoadedImage
from data_tools.pipeline.job import Job, Task, tokenizer_at
from megavl.config.version import VERSION
from megavl.data.image import FORMATS
from megavl.data.index_file import index_bytes
from megavl.data.manifest import (
    IMAGE_ROW,
    MODALITIES,
    SAMPLE_ROW,
    SPAN_ROW,
    Modality,
    ShardEntry,
    ShardManifest,
    SourceEntry,
    geometry_entry,
    to_json,
)
from megavl.files.new_file import NewFile, sync_directory, write_file

_CODES = {"u1": "B", "i4": "i", "u4": "I", "i8": "q"}
"""`struct` codes of the columns."""


class ShardWriter:
    """Collects the samples of one shard."""

    def __init__(self, job: Job, task: Task, *, count: int, modality: Modality) -> None:
        """Open the data files; `count` is the number of tasks of the job."""
        self.name = f"{modality}-{task.number:05d}"
        self._directory = directory = Path(job.output)
        self._modality: Modality = modality
        self._job, self._task, self._count = job, task, count
        self._tokens = NewFile(directory / f"{self.name}.tokens.bin")
        self._images = NewFile(directory / f"{self.name}.images.bin") if modality == "multimodal" else None
        self._lengths, self._image_sizes = array("i"), array("i")
        self._samples, self._spans, self._image_rows = _Table(SAMPLE_ROW), _Table(SPAN_ROW), _Table(IMAGE_ROW)
        self._image_starts = array("q")
        self._stored: dict[tuple[tuple[int, int], ...], int] = {}
        self._slots = 0
        self._max_token = 0

    def __len__(self) -> int:
        return len(self._samples)

    def add(
        self,
        ids: npt.NDArray[np.int32],
        *,
        spans: Sequence[tuple[int, int]],
        images: Sequence[LoadedImage],
        position: int,
    ) -> None:
        """Append a sample; images that an earlier sample of this shard also has are stored once."""
        first = self._store(images) if images else 0
        data = ids.astype("<i4").tobytes()
        self._tokens.write(data)
        self._lengths.append(len(ids))
        kind = MODALITIES.index(self._modality)
        self._samples.append(0, position, first, len(images), len(self._spans), len(spans), kind, zlib.crc32(data))
        for span in spans:
            self._spans.append(*span)
        self._slots += len(images)
        self._max_token = max(self._max_token, int(ids.max(initial=0)))

    def commit(self, *, source: SourceEntry) -> ShardEntry:
        """Write indexes and tables, then the manifest."""
        files = [self._tokens.commit(), self._write("tokens.idx", index_bytes(_int32(self._lengths), dtype="int32"))]
        if self._images is not None:
            sizes = _int32(self._image_sizes)
            files += [
                self._images.commit(),
                self._write("images.idx", index_bytes(sizes, dtype="uint8")),
                self._write("images.npy", self._image_rows.npy()),
            ]
        files += [
            self._write("samples.npy", self._samples.npy()),
            self._write("spans.npy", self._spans.npy()),
        ]
        sync_directory(self._directory)
        job, tokens = self._job, sum(self._lengths)
        manifest = ShardManifest(
            code_version=VERSION,
            config_sha256=job.config_sha256,
            name=self.name,
            modality=self._modality,
            number=self._task.number,
            count=self._count,
            sources=(source,),
            files=tuple(files),
            samples=len(self._samples),
            images=len(self._image_rows),
            tokens=tokens,
            image_tokens=self._slots * job.geometry.tokens,
            max_token=self._max_token,
            tokenizer=tokenizer_at(job.tokenizer).entry,
            seq_length=job.seq_length,
            geometry=geometry_entry(job.geometry),
            template=job.inputs[self._task.input].template,
        )
        written = write_file(self._directory / f"{self.name}.json", to_json(manifest))
        return ShardEntry(
            name=self.name, sha256=written.sha256, samples=len(self._samples), tokens=tokens, images=self._slots
        )

    def discard(self) -> None:
        """Remove temporary files."""
        for file in (self._tokens, self._images):
            if file is not None:
                file.discard()

    def _write(self, suffix: str, data: bytes) -> Any:
        return write_file(self._directory / f"{self.name}.{suffix}", data)

    def _store(self, images: Sequence[LoadedImage]) -> int:
        assert self._images is not None, "text shards hold no images"
        checksums = [zlib.crc32(image.data) for image in images]
        key = tuple((len(image.data), checksum) for image, checksum in zip(images, checksums))
        first = self._stored.get(key)
        if first is not None and self._are_at(first, images):
            return first
        first = self._stored[key] = len(self._image_rows)
        for image, checksum in zip(images, checksums):
            self._image_starts.append(self._images.size)
            self._images.write(image.data)
            self._image_sizes.append(len(image.data))
            info = image.info
            self._image_rows.append(info.width, info.height, FORMATS.index(info.format), checksum)
        return first

    def _are_at(self, first: int, images: Sequence[LoadedImage]) -> bool:
        """Whether the images stored from `first` on equal these; equal checksums do not prove it."""
        assert self._images is not None, "text shards hold no images"
        starts = self._image_starts[first : first + len(images)]
        return all(self._images.read_back(start, len(image.data)) == image.data for start, image in zip(starts, images))


class _Table:
    """Rows of an `.npy` table, as compact as in the file: a list of tuples would take ten times as much."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._row = struct.Struct("<" + "".join(_CODES[dtype[name].str[1:]] for name in dtype.names or ()))
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data) // self._row.size

    def append(self, *row: int) -> None:
        """Add one row."""
        self._data += self._row.pack(*row)

    def npy(self) -> bytes:
        """The table as an `.npy` file."""
        out = io.BytesIO()
        np.save(out, np.frombuffer(self._data, self._dtype), allow_pickle=False)
        return out.getvalue()


def _int32(values: array[int]) -> npt.NDArray[np.int32]:
    return np.frombuffer(values, np.int32) if values else np.zeros(0, np.int32)
