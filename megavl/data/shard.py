"""One shard: manifest, file sizes and headers are checked when it is opened, contents on request by their hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError
from megavl.data.index_file import SequenceFile
from megavl.data.manifest import (
    IMAGE_ROW,
    SAMPLE_ROW,
    SPAN_ROW,
    FileEntry,
    ShardManifest,
    read_manifest,
)
from megavl.data.table import ReadHandles, open_table
from megavl.files.hashing import file_sha256

_RESTORE = "restore the file or start data_tools/preprocess.py again with --no-resume"


class Shard:
    """Reader of one shard; its memory does not grow with its samples."""

    def __init__(self, directory: str | Path, *, name: str, handles: ReadHandles, sha256: str | None = None) -> None:
        """Check the manifest, and the header and size of every file; `check_file` reads the contents.

        Args:
            directory: of the dataset.
            name: such as `text-00000`.
            handles: where data is read through.
            sha256: of its manifest; default: not compared.

        Raises:
            DataError: naming the file that is missing or contradicts the manifest.
        """
        directory = Path(directory)
        self.manifest = read_manifest(directory / f"{name}.json", kind=ShardManifest, sha256=sha256)
        for entry in self.manifest.files:
            _check_size(directory, entry)
        counts, prefix = self.manifest, directory / name
        self.tokens = SequenceFile(f"{prefix}.tokens", dtype="int32", sequences=counts.samples, handles=handles)
        self.samples = open_table(f"{prefix}.samples.npy", dtype=SAMPLE_ROW, rows=counts.samples, handles=handles)
        self.spans = open_table(f"{prefix}.spans.npy", dtype=SPAN_ROW, handles=handles)
        if counts.images:
            self.images = SequenceFile(f"{prefix}.images", dtype="uint8", sequences=counts.images, handles=handles)
            self.image_table = open_table(f"{prefix}.images.npy", dtype=IMAGE_ROW, rows=counts.images, handles=handles)

    def spans_of(self, sample: int) -> npt.NDArray[np.void]:
        """Supervised target positions of a sample, rows of SPAN_ROW."""
        row = self.samples[sample]
        return self.spans.rows(int(row["first_span"]), int(row["spans"]))

    def images_of(self, sample: int) -> range:
        """Sequences of the images pair that a sample uses."""
        row = self.samples[sample]
        return range(int(row["first_image"]), int(row["first_image"]) + int(row["images"]))

    def origin(self, sample: int) -> str:
        """`file:record` that a sample was made from."""
        row = self.samples[sample]
        return f"{self.manifest.sources[int(row['source'])].name}:{int(row['place'])}"


def check_file(directory: str | Path, entry: FileEntry) -> None:
    """Compare a file with what its manifest says.

    Raises:
        DataError: missing, or other size or sha256; names both.
    """
    path = _check_size(Path(directory), entry)
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}); {_RESTORE}") from error
    if found != entry.sha256:
        raise DataError(f"{path}: sha256 {found} is not the {entry.sha256} of its manifest; {_RESTORE}")


def _check_size(directory: Path, entry: FileEntry) -> Path:
    if Path(entry.name).name != entry.name:
        raise DataError(f"{directory}: a manifest names {entry.name!r}, which is not a plain file name; {_RESTORE}")
    path = directory / entry.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: missing ({error.strerror}), though its manifest lists it; {_RESTORE}") from error
    if size != entry.size:
        raise DataError(f"{path}: has {size} bytes where its manifest says {entry.size}; {_RESTORE}")
    return path
