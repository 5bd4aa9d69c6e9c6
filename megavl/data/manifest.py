"""The contract between preprocessing and training: manifests of a shard and of a dataset, and their fixed-width tables.

Every file is plain JSON or a plain little-endian array, so that nothing read here is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from megavl.config.errors import DataError
from megavl.config.presets import ImageGeometry
from megavl.files.new_file import FileEntry as FileEntry
from megavl.foreign.parsing import LARGE_JSON_FILE, parse_json
from megavl.foreign.reading import read_limited
from megavl.foreign.typed import typed

FORMAT_VERSION = 2
"""Raised when files of an older version can no longer be read."""

Modality = Literal["text", "multimodal"]

MODALITIES: tuple[Modality, Modality] = ("text", "multimodal")
"""Modality by the number that tables store."""

SAMPLE_ROW = np.dtype(
    [
        ("source", "<i4"),  # row of the shard manifest's sources
        ("place", "<i8"),  # line, item, member or row in that source, from 1
        ("first_image", "<i8"),  # sequence of the images pair
        ("images", "<i4"),
        ("first_span", "<i8"),  # row of NAME.spans.npy
        ("spans", "<i4"),
        ("modality", "u1"),
        ("crc32", "<u4"),  # of the int32 tokens
    ]
)
SPAN_ROW = np.dtype([("start", "<i4"), ("end", "<i4")])
"""Supervised target positions of a sample, half open."""
IMAGE_ROW = np.dtype([("width", "<i4"), ("height", "<i4"), ("format", "u1"), ("crc32", "<u4")])
"""One stored image file; `format` is a row of `megavl.data.image.FORMATS`."""
PACK_ROW = np.dtype(
    [
        ("pack", "<i8"),  # numbered through the dataset, text packs first
        ("modality", "u1"),
        ("shard", "<i4"),  # row of the dataset manifest's shards
        ("sample", "<i8"),
        ("tokens", "<i4"),
        ("images", "<i4"),
    ]
)
"""One member of a pack; members of a pack are adjacent and in sequence order."""


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """The byte range of an input file that a shard was made from."""

    name: str
    start: int
    """First byte."""
    end: int
    """Byte after the last."""
    sha256: str
    """Of these bytes."""
    places: Literal["line", "item", "member", "row"]
    """What `place` counts: lines of a JSONL file, items of a JSON array, members of a tar, rows of a Parquet file."""


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer that made the ids."""

    sha256: str
    """Of tokenizer.json, or of the SentencePiece model."""
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    image_id: int | None


@dataclass(frozen=True, kw_only=True)
class GeometryEntry:
    """What the image token count and the canvas follow from; `megavl.config.presets.ImageGeometry` and its rule."""

    canvas_size: int
    low_size: int
    patch_size: int
    min_size: int
    background: tuple[int, int, int]
    tokens: int
    resize: str = "max(int(side / longest * canvas_size), min_size), bicubic, centred"


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """Content of `NAME.json`; writing it commits the shard."""

    format: Literal["megavl-shard"] = "megavl-shard"
    version: int = FORMAT_VERSION
    code_version: str
    """`megavl.config.version.VERSION` of the code that wrote it."""
    config_sha256: str
    """Of the settings and inputs of the preprocessing run."""
    name: str
    modality: Modality
    number: int
    """Number of the input split among `count`."""
    count: int
    sources: tuple[SourceEntry, ...]
    files: tuple[FileEntry, ...]
    samples: int
    images: int
    """Sequences of the images pair."""
    tokens: int
    image_tokens: int
    max_token: int
    """Largest id in the shard."""
    tokenizer: TokenizerEntry
    seq_length: int
    geometry: GeometryEntry
    template: str
    """Usual template of its input; the manifest of the dataset names all that were used."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as the dataset manifest lists it."""

    name: str
    sha256: str
    """Of `NAME.json`."""
    samples: int
    tokens: int
    images: int
    """Image slots of its samples (an image used twice counts twice)."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Limits of one packed sequence."""

    packed: bool
    """False: one sample per sequence."""
    seq_length: int
    max_images: int


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """Content of `manifest.json`; a directory without it is not a dataset."""

    format: Literal["megavl-dataset"] = "megavl-dataset"
    version: int = FORMAT_VERSION
    code_version: str
    """Of all shards too: a run is not continued by another version."""
    config_sha256: str
    pack: PackSettings
    shards: tuple[ShardEntry, ...]
    packs: FileEntry
    text_packs: int
    multimodal_packs: int
    tokenizer: TokenizerEntry
    geometry: GeometryEntry
    templates: tuple[str, ...]
    """Of the inputs, sorted, each once."""
    fingerprint: str
    """See `fingerprint`."""


def geometry_entry(geometry: ImageGeometry) -> GeometryEntry:
    """The manifest's form of a geometry."""
    return GeometryEntry(**dataclasses.asdict(geometry), tokens=geometry.tokens)


def to_json(value: Any) -> bytes:
    """A dataclass or mapping as JSON, the same bytes for the same content."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return (json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def fingerprint(manifest: DatasetManifest) -> str:
    """Identity of a dataset: sha256 over its manifest without the fingerprint itself.

    The manifest holds the hashes of the packs table and of the shard manifests, and those hold all others.
    """
    content = {key: value for key, value in dataclasses.asdict(manifest).items() if key != "fingerprint"}
    return hashlib.sha256(to_json(content)).hexdigest()


Manifest = TypeVar("Manifest", ShardManifest, DatasetManifest)


def read_manifest(path: str | Path, *, kind: type[Manifest], sha256: str | None = None) -> Manifest:
    """A manifest.

    Args:
        path: JSON file.
        kind: class of its content.
        sha256: what the file must hash to; default: anything.

    Raises:
        DataError: missing, not of this kind, of another version, of another hash, or not byte for byte what `to_json`
            makes of its content.
    """
    try:
        raw = read_limited(path, limit=LARGE_JSON_FILE.size)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: not found; preprocessing of this dataset has not finished, "
            "so give the directory of a finished run or start data_tools/preprocess.py again"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read ({reason}); give the directory of a dataset") from error
    found = hashlib.sha256(raw).hexdigest()
    if sha256 not in (None, found):
        raise DataError(
            f"{path}: sha256 {found} is not the {sha256} of the dataset's manifest; restore the file or start "
            "data_tools/preprocess.py again with --no-resume"
        )
    try:
        content = parse_json(raw, limit=LARGE_JSON_FILE)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); preprocess the dataset again") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: has format version {version!r}, this code reads {FORMAT_VERSION}; "
            "preprocess the dataset again with this version"
        )
    try:
        manifest = typed(kind, content)
    except ValueError as error:
        raise DataError(f"{path}: {error}; preprocess the dataset again") from error
    written = to_json(manifest)
    if raw != written:
        # White space and the spelling of characters and numbers can change without changing the content.
        offset = next((n for n, (a, b) in enumerate(zip(raw, written)) if a != b), min(len(raw), len(written)))
        raise DataError(
            f"{path}: byte {offset} is not the one that preprocessing wrote; restore the file or start "
            "data_tools/preprocess.py again with --no-resume"
        )
    return manifest
