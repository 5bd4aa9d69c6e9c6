"""Writes the table of packs, in order of packs, while the shards give their samples in order of input.

Memory does not grow with the number of samples, because the rows are sorted through an unnamed file. Shards are read in
blocks, three times. The first pass counts the kinds of samples, the second the samples in each range of packs. The
third writes the rows of each range together. Then each range is sorted alone.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megavl.data.manifest import MODALITIES, PACK_ROW, Modality
from megavl.data.packing import Cursor, Kinds, Packing
from megavl.files.new_file import NewFile, storage_error

_ROW = np.dtype([("kind", "<i4"), ("row", PACK_ROW)])
"""A row before its range is sorted."""
_SORTED_ROWS = 1 << 16
"""Rows of a range, at least."""
_RANGES = 1 << 10
"""Number of ranges, at most: in a large dataset a range has more rows."""
_BINS = 1 << 17
"""Number of borders at which a range may end."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Successive samples of one shard."""

    shard: int
    first: int
    """Number of the first sample in its shard."""
    lengths: npt.NDArray[np.int32]
    images: npt.NDArray[np.int32]


@dataclass(kw_only=True)
class Tally:
    """Totals over the packs of one modality."""

    count: int
    tokens: int = 0
    images: int = 0
    filler_tokens: int = 0
    """Tokens of samples without images, in packs that have images."""
    totals: Counter[int] = field(default_factory=Counter)
    """Number of packs by their tokens."""


class PackTable:
    """Packs the samples that `blocks` gives; each call of it must give the same samples in the same order."""

    def __init__(
        self, blocks: Callable[[], Iterable[Block]], *, seq_length: int, max_images: int, packed: bool
    ) -> None:
        """Pack under the limits of a sequence; without `packed` every sample gets its own sequence."""
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
        """All rows in order of packs, range by range."""
        packs = self._packing.text + self._packing.multimodal
        width = max(1, -(-packs // _BINS))
        sizes = np.zeros(-(-packs // width), np.int64)
        cursor = self._packing.cursor()
        for block in self._blocks():
            bins = self._rows(block, cursor)["row"]["pack"] // width
            sizes += np.bincount(bins, minlength=len(sizes))
        ranges = (np.cumsum(sizes) - sizes) // max(_SORTED_ROWS, -(-self.samples // _RANGES))
        counts = np.bincount(ranges, weights=sizes).astype(np.int64) if packs else np.zeros(0, np.int64)
        try:
            # A file without a name disappears however the process ends.
            with tempfile.TemporaryFile(dir=directory) as scratch:
                self._distribute(scratch, ranges=ranges, width=width, starts=np.cumsum(counts) - counts)
                scratch.seek(0)
                for count in counts[counts > 0].tolist():
                    yield self._in_order(np.frombuffer(scratch.read(count * _ROW.itemsize), _ROW))
        except OSError as error:
            raise storage_error(directory / "packs.npy", error) from error

    def _distribute(
        self, scratch: BinaryIO, *, ranges: npt.NDArray[np.int64], width: int, starts: npt.NDArray[np.int64]
    ) -> None:
        """Write every row to its range; inside a range the rows stay in order of samples."""
        cursor, ends = self._packing.cursor(), starts.copy()
        for block in self._blocks():
            rows = self._rows(block, cursor)
            owners = ranges[rows["row"]["pack"] // width]
            rows = rows[np.argsort(owners, kind="stable")]
            found, counts = np.unique(owners, return_counts=True)
            for owner, part in zip(found.tolist(), np.split(rows, np.cumsum(counts)[:-1])):
                scratch.seek(int(ends[owner]) * _ROW.itemsize)
                scratch.write(part.tobytes())
                ends[owner] += len(part)

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
        """Sort the rows of whole packs, and add them to the tallies."""
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
