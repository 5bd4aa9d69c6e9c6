"""Writing one shard: token and image pairs, tables, manifest last."""

from __future__ import annotations

import io
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.pipeline.commit import NewFile, sync_directory, write_file
from data_tools.pipeline.image_source import LoadedImage
from megavl.config.version import VERSION
from megavl.data.image import FORMATS
from megavl.data.index_file import index_bytes
from megavl.data.manifest import (
    IMAGE_ROW,
    MODALITIES,
    SAMPLE_ROW,
    SPAN_ROW,
    GeometryEntry,
    Modality,
    ShardEntry,
    ShardManifest,
    SourceEntry,
    TokenizerEntry,
    to_json,
)

_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class ShardIdentity:
    """What a shard's manifest says besides its content."""

    config_sha256: str
    number: int
    count: int
    tokenizer: TokenizerEntry
    seq_length: int
    geometry: GeometryEntry
    template: str


class ShardWriter:
    """Collects the samples of one shard; use as a context, so that nothing half-written stays."""

    def __init__(self, directory: Path, *, modality: Modality, identity: ShardIdentity) -> None:
        """Open the data files."""
        self.name = f"{modality}-{identity.number:05d}"
        self._directory = directory
        self._modality: Modality = modality
        self._identity = identity
        self._tokens = NewFile(directory / f"{self.name}.tokens.bin")
        self._images = NewFile(directory / f"{self.name}.images.bin") if modality == "multimodal" else None
        self._lengths, self._image_sizes = array("i"), array("i")
        self._samples, self._spans, self._image_rows = _Rows(SAMPLE_ROW), _Rows(SPAN_ROW), _Rows(IMAGE_ROW)
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
        place: int,
    ) -> None:
        """Append a sample; images that an earlier sample of this shard used alike are stored once."""
        first = self._store(images) if images else 0
        data = ids.astype("<i4").tobytes()
        self._tokens.write(data)
        self._lengths.append(len(ids))
        kind = MODALITIES.index(self._modality)
        self._samples.append((0, place, first, len(images), len(self._spans), len(spans), kind, zlib.crc32(data)))
        for span in spans:
            self._spans.append(span)
        self._slots += len(images)
        self._max_token = max(self._max_token, int(ids.max(initial=0)))

    def commit(self, source: SourceEntry) -> ShardEntry:
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
        identity, tokens = self._identity, sum(self._lengths)
        manifest = ShardManifest(
            code_version=VERSION,
            config_sha256=identity.config_sha256,
            name=self.name,
            modality=self._modality,
            number=identity.number,
            count=identity.count,
            sources=(source,),
            files=tuple(files),
            samples=len(self._samples),
            images=len(self._image_rows),
            tokens=tokens,
            image_tokens=self._slots * identity.geometry.tokens,
            max_token=self._max_token,
            tokenizer=identity.tokenizer,
            seq_length=identity.seq_length,
            geometry=identity.geometry,
            template=identity.template,
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
            self._image_rows.append((info.width, info.height, FORMATS.index(info.format), checksum))
        return first

    def _are_at(self, first: int, images: Sequence[LoadedImage]) -> bool:
        """Whether these images are stored from `first` on; equal checksums do not prove it."""
        assert self._images is not None, "text shards hold no images"
        starts = self._image_starts[first : first + len(images)]
        return all(self._images.read_back(start, len(image.data)) == image.data for start, image in zip(starts, images))


class _Rows:
    """A table under construction, as compact as its file: tuples alone would take ten times as much."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._blocks: list[npt.NDArray[np.void]] = []
        self._open: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK_ROWS + len(self._open)

    def append(self, row: tuple[int, ...]) -> None:
        """Add one row."""
        self._open.append(row)
        if len(self._open) == _BLOCK_ROWS:
            self._blocks.append(np.array(self._open, self._dtype))
            self._open = []

    def npy(self) -> bytes:
        """The table as an `.npy` file."""
        out = io.BytesIO()
        table = np.concatenate([*self._blocks, np.array(self._open, self._dtype)])
        np.save(out, table, allow_pickle=False)
        return out.getvalue()


def _int32(values: array[int]) -> npt.NDArray[np.int32]:
    return np.frombuffer(values, np.int32) if values else np.zeros(0, np.int32)
