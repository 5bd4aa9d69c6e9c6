"""The packs of a dataset, written in order of packs while shards give samples in order of input.

Memory does not grow with the samples. Shards are read in blocks, three times: to count kinds of samples, to count the
samples in each stretch of packs, and to distribute their rows over these stretches in an unnamed file. Each stretch is
then sorted alone.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.pipeline.commit import NewFile, storage_error
from megavl.data.manifest import MODALITIES, PACK_ROW, Modality
from megavl.data.packing import Cursor, Kinds, Packing

_ROW = np.dtype([("kind", "<i4"), ("row", PACK_ROW)])
"""A row before its pack is sorted."""
_SORTED_ROWS = 1 << 16
"""Rows sorted at a time, at least."""
_STRETCHES = 1 << 10
"""Stretches of packs, at most: more rows are sorted at a time in a dataset of many samples."""
_BINS = 1 << 17
"""Borders between which a stretch may end."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Successive samples of one shard."""

    shard: int
    first: int
    """Number of the first of them in the shard."""
    lengths: npt.NDArray[np.int32]
    images: npt.NDArray[np.int32]


@dataclass(kw_only=True)
class Tally:
    """What the packs of a modality hold."""

    count: int
    tokens: int = 0
    images: int = 0
    filler_tokens: int = 0
    """Of samples without images beside samples with them."""
    totals: Counter[int] = field(default_factory=Counter)
    """Number of packs by their tokens."""


class PackTable:
    """Packs of the samples that `blocks` gives, the same ones in the same order whenever it is called."""

    def __init__(
        self, blocks: Callable[[], Iterable[Block]], *, seq_length: int, max_images: int, packed: bool
    ) -> None:
        """Pack.

        Args:
            blocks: all samples.
            seq_length: token limit of a sequence.
            max_images: image limit of a sequence.
            packed: False puts every sample into a sequence of its own.
        """
        self._blocks = blocks
        kinds = Kinds(seq_length=seq_length, max_images=max_images)
        for block in blocks():
            kinds.add(block.lengths, images=block.images)
        self.kinds = kinds.table()
        """(kinds, 4): key, tokens, images and number of samples."""
        self.samples = int(self.kinds[:, 3].sum())
        self._packing = Packing(kinds, packed=packed)
        self.tallies: dict[Modality, Tally] = {
            "text": Tally(count=self._packing.text),
            "multimodal": Tally(count=self._packing.multimodal),
        }
        """Complete once `write` or `count` has gone through all packs."""

    def write(self, file: NewFile) -> None:
        """Write `packs.npy`.

        Raises:
            StorageError: the storage is full or failing.
        """
        header = io.BytesIO()
        shape = np.lib.format.header_data_from_array_1_0(np.empty(0, PACK_ROW)) | {"shape": (self.samples,)}
        np.lib.format.write_array_header_1_0(header, shape)
        file.write(header.getvalue())
        for rows in self._sorted(file.path.parent):
            file.write(rows.view(np.uint8).data)

    def count(self) -> None:
        """Go through all packs in memory and write nothing."""
        cursor = self._packing.cursor()
        none = np.empty(0, _ROW)
        self._in_order(np.concatenate([none, *(self._rows(block, cursor) for block in self._blocks())]))

    def _sorted(self, directory: Path) -> Iterator[npt.NDArray[np.void]]:
        """All rows in order of packs, stretch by stretch."""
        packs = self._packing.text + self._packing.multimodal
        width = max(1, -(-packs // _BINS))
        sizes = np.zeros(-(-packs // width), np.int64)
        cursor = self._packing.cursor()
        for block in self._blocks():
            bins = self._rows(block, cursor)["row"]["pack"] // width
            sizes += np.bincount(bins, minlength=len(sizes))
        stretches = (np.cumsum(sizes) - sizes) // max(_SORTED_ROWS, -(-self.samples // _STRETCHES))
        counts = np.bincount(stretches, weights=sizes).astype(np.int64) if packs else np.zeros(0, np.int64)
        try:
            # It has no name, so that nothing of it is left when the process ends in any way.
            with tempfile.TemporaryFile(dir=directory, buffering=0) as scratch:
                self._distribute(scratch, stretches=stretches, width=width, starts=np.cumsum(counts) - counts)
                scratch.seek(0)
                for count in counts[counts > 0].tolist():
                    raw = _read(scratch, count * _ROW.itemsize)
                    yield self._in_order(np.frombuffer(raw, _ROW))
        except OSError as error:
            raise storage_error(directory / "packs.npy", error) from error

    def _distribute(
        self, scratch: BinaryIO, *, stretches: npt.NDArray[np.int64], width: int, starts: npt.NDArray[np.int64]
    ) -> None:
        """Write every row to its stretch; in a stretch they stay in order of samples."""
        cursor, ends = self._packing.cursor(), starts.copy()
        for block in self._blocks():
            rows = self._rows(block, cursor)
            owners = stretches[rows["row"]["pack"] // width]
            rows = rows[np.argsort(owners, kind="stable")]
            found, counts = np.unique(owners, return_counts=True)
            for stretch, part in zip(found.tolist(), np.split(rows, np.cumsum(counts)[:-1])):
                scratch.seek(int(ends[stretch]) * _ROW.itemsize)
                _write(scratch, part.tobytes())
                ends[stretch] += len(part)

    def _rows(self, block: Block, cursor: Cursor) -> npt.NDArray[np.void]:
        placed = cursor.place(block.lengths, images=block.images)
        rows = np.empty(len(block.lengths), _ROW)
        rows["kind"], row = placed.kinds, rows["row"]
        row["pack"] = placed.packs + np.where(placed.multimodal, self._packing.text, 0)
        row["modality"], row["shard"] = placed.multimodal, block.shard
        row["sample"] = np.arange(block.first, block.first + len(rows))
        row["tokens"], row["images"] = block.lengths, block.images
        return rows

    def _in_order(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Rows of whole packs sorted into them, and counted."""
        found = np.ascontiguousarray(rows["row"][np.lexsort((rows["kind"], rows["row"]["pack"]))])
        for kind, modality in enumerate(MODALITIES):
            part, tally = found[found["modality"] == kind], self.tallies[modality]
            if not len(part):
                continue
            sizes = np.unique(part["pack"], return_counts=True)[1]
            starts = np.cumsum(sizes) - sizes
            held, tokens = (np.add.reduceat(part[name].astype(np.int64), starts) for name in ("images", "tokens"))
            filler = (part["images"] == 0) & (np.repeat(held, sizes) > 0)
            tally.tokens += int(tokens.sum())
            tally.images += int(held.sum())
            tally.filler_tokens += int(part["tokens"][filler].sum(dtype=np.int64))
            totals, times = np.unique(tokens, return_counts=True)
            tally.totals.update(dict(zip(totals.tolist(), times.tolist())))
        return found


def _read(file: Any, size: int) -> bytes:
    """Exactly so many bytes: a raw file may give fewer at once."""
    parts = []
    while size:
        parts.append(file.read(size))
        assert parts[-1], "the file was written by this process a moment ago"
        size -= len(parts[-1])
    return b"".join(parts)


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
