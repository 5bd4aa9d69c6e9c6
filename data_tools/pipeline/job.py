"""What one preprocessing run makes: inputs, settings, and the units of work that follow from them alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from data_tools.readers.files import choose_format, container_of, divide_file
from data_tools.readers.formats import FORMATS, Container
from data_tools.readers.parquet_table import column_names
from data_tools.readers.splits import Stretch
from megavl.config.errors import UsageError
from megavl.config.presets import IMAGE_PRESETS, ImageGeometry
from megavl.config.version import VERSION
from megavl.data.image import Verification
from megavl.data.manifest import FORMAT_VERSION, PackSettings, to_json
from megavl.data.template import Template
from megavl.data.tokenizer import Tokenizer, open_tokenizer

_PARTS = 64
"""Shards of a run whose inputs are neither very small nor very large."""
_STRETCHES = {"text": (256 << 10, 256 << 20), "paths": (64 << 10, 8 << 20), "images": (32 << 20, 256 << 20)}
"""Bytes of input per shard, least and most: of text, of records that name images and stand for far more output than
their own bytes, and of records that bring images along."""
_ENDS = 64 << 10
"""Bytes at either end of an input that identify it."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input file."""

    path: str
    container: Container
    format: str
    content: Literal["text", "paths", "images"]
    """What most of its bytes are."""
    template: Template
    size: int
    """Bytes."""
    ends_sha256: str
    """Of its first and last 64 KiB."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the output depends on, and where it goes."""

    inputs: tuple[Input, ...]
    tokenizer: str
    tokenizer_sha256: str
    seq_length: int
    packed: bool
    max_images: int
    image_preset: str
    max_side: int
    image_root: str | None
    image_map: str | None
    image_map_sha256: str | None
    verify: Verification
    max_aspect: float
    system_prompt: str
    over_long: Literal["drop", "cut"]
    """What a conversation above the limits of a sequence does."""
    limit: int | None
    output: str
    fail_on_error: bool
    """End the run at the first record that is rejected."""
    dry_run: bool

    @property
    def geometry(self) -> ImageGeometry:
        """How images will be read."""
        return IMAGE_PRESETS[self.image_preset]

    @property
    def pack_settings(self) -> PackSettings:
        """Limits of one sequence."""
        return PackSettings(packed=self.packed, seq_length=self.seq_length, max_images=self.max_images)

    @property
    def config(self) -> dict[str, Any]:
        """What the bytes of the output follow from."""
        apart = {"output", "fail_on_error", "dry_run", "tokenizer", "image_map"}
        settings = {key: value for key, value in asdict(self).items() if key not in apart}
        made_by = {"format_version": FORMAT_VERSION, "code_version": VERSION}
        plain: dict[str, Any] = json.loads(json.dumps({**settings, **made_by}))
        return plain

    @property
    def config_sha256(self) -> str:
        """Identity of `config`."""
        return hashlib.sha256(to_json(self.config)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One stretch of one input; makes at most one text and one multimodal shard."""

    number: int
    input: int
    stretch: Stretch
    sample: int | None = None
    """Records to look at, in dry runs; default: all."""

    @property
    def records(self) -> int:
        """Records to look at."""
        return self.stretch.records if self.sample is None else self.sample


def open_input(path: str, *, format: str, template: Template | None) -> Input:
    """Look at an input file.

    Args:
        path: JSONL, JSON array, tar archive or Parquet file.
        format: row of FORMATS, or `auto`.
        template: default: the format's own.

    Raises:
        UsageError: unreadable, empty, of no known format, or of one that cannot take the template.
        DataError: compressed or damaged.
    """
    try:
        if not os.path.isfile(path):
            raise UsageError(f"--input {path}: no such file; give JSONL, JSON, tar or Parquet files")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(_ENDS)
            stream.seek(max(0, size - _ENDS))
            digest = hashlib.sha256(start + stream.read(_ENDS))
    except OSError as error:
        raise UsageError(f"--input {path}: cannot read ({error.strerror}); give a readable file") from error
    container = container_of(path, start=start)
    format = choose_format(path, container=container, asked=format)
    usual = FORMATS[format].template
    if template == "deepseek" and usual != "deepseek":
        raise UsageError(f"--template deepseek: {path} has format {format}, which has no turns; use plain or none")
    return Input(
        path=path,
        container=container,
        format=format,
        content=_content(path, container=container, format=format, start=start),
        template=template or usual,
        size=size,
        ends_sha256=digest.hexdigest(),
    )


@lru_cache(maxsize=1)
def tokenizer_at(path: str) -> Tokenizer:
    """The tokenizer at a path, opened once per process: a large vocabulary takes half a second."""
    return open_tokenizer(path)


def plan_units(job: Job) -> list[Unit]:
    """Divide the inputs; the same units for any number of workers and tasks."""
    units: list[Unit] = []
    left = job.limit
    total = sum(source.size for source in job.inputs)
    for number, source in enumerate(job.inputs):
        if left == 0:
            break
        least, most = _STRETCHES[source.content]
        size = min(max(total // _PARTS, least), most)
        for stretch in divide_file(source.path, container=source.container, size=size, limit=left):
            units.append(Unit(number=len(units), input=number, stretch=stretch))
            left = None if left is None else left - stretch.records
    return units


def sampled(units: Sequence[Unit], *, limit: int) -> list[Unit]:
    """The same units with their share of `limit` records each, the first ones, and one at least of each input."""
    total = sum(unit.stretch.records for unit in units)
    chosen: list[Unit] = []
    before, inputs = 0, set[int]()
    for unit in units:
        after = before + unit.stretch.records
        share = limit * after // total - limit * before // total
        before = after
        if unit.input not in inputs:
            share = max(share, 1)
        if share:
            inputs.add(unit.input)
            chosen.append(replace(unit, sample=min(share, unit.stretch.records)))
    return chosen


def _content(path: str, *, container: Container, format: str, start: bytes) -> Literal["text", "paths", "images"]:
    """Decides nothing but the size of shards."""
    if format == "obelics":
        return "paths"
    if container == "parquet":
        return "images" if {"image", "images"} & set(column_names(path)) else "text"
    if container == "tar" or b"data:image/" in start:
        return "images"
    return "text" if format == "text" else "paths"
