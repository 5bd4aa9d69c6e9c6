"""One preprocessing run: its inputs, its settings, and the tasks that follow from them alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from data_tools.readers.files import choose_format, container_of, divide_file, schema_of
from data_tools.readers.formats import FORMATS, Container
from data_tools.readers.record import IMAGE_KEYS
from data_tools.readers.splits import Split
from megavl.config.chat import IMAGE_TOKEN
from megavl.config.errors import UsageError
from megavl.config.presets import IMAGE_PRESETS, ImageGeometry
from megavl.config.version import VERSION
from megavl.data.image import Verification
from megavl.data.manifest import FORMAT_VERSION, PackSettings, to_json
from megavl.data.template import Template
from megavl.data.tokenizer import Tokenizer, open_tokenizer

_PARTS = 64
"""Number of splits that a run aims at; the limits below come first."""
_SPLIT_BYTES = {"text": (256 << 10, 256 << 20), "paths": (64 << 10, 8 << 20), "images": (32 << 20, 256 << 20)}
"""Fewest and most bytes of a split, by the content of the input.

`paths` are records that name images, so their output is far larger than they are. `images` are records that contain
them.
"""
_ENDS = 64 << 10
"""Bytes at the start and at the end of an input that identify it."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input file."""

    path: str
    container: Container
    format: str
    content: Literal["text", "paths", "images"]
    """What most of its bytes hold."""
    only: str | None
    """The format that every record must have, if one was asked for."""
    template: Template
    template_given: bool
    """Otherwise each record has the template of its own kind."""
    size: int
    ends_sha256: str
    """Hash of its first and last 64 KiB."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the output depends on, and its folder."""

    inputs: tuple[Input, ...]
    files_left_out: tuple[tuple[str, int], ...]
    """Number of files of input folders that are not read, by the end of their names."""
    tokenizer: str
    tokenizer_sha256: str
    seq_length: int
    packed: bool
    max_images: int
    image_preset: str
    columns: tuple[tuple[str, str], ...]
    """Names that the formats use, and those that the records have instead."""
    ignore: tuple[str, ...]
    """Keys of records that are left out."""
    max_side: int
    image_root: tuple[str, ...] | None
    """Folders of images; None means the folder of each input."""
    follow_links: bool
    image_map: str | None
    image_map_sha256: str | None
    verify: Verification
    max_aspect: float
    system_prompt: str
    over_long: Literal["drop", "cut"]
    """Whether a conversation above the limits of a sequence is rejected or truncated."""
    limit: int | None
    output: str
    fail_on_error: bool
    """End the run at the first record that is rejected."""
    dry_run: bool

    @property
    def geometry(self) -> ImageGeometry:
        """Image geometry of the model."""
        return IMAGE_PRESETS[self.image_preset]

    @property
    def pack_settings(self) -> PackSettings:
        """Limits of one sequence."""
        return PackSettings(packed=self.packed, seq_length=self.seq_length, max_images=self.max_images)

    @cached_property
    def config(self) -> dict[str, Any]:
        """All settings that determine the bytes of the output."""
        apart = {"output", "fail_on_error", "dry_run", "tokenizer", "image_map", "files_left_out"}
        settings = {key: value for key, value in asdict(self).items() if key not in apart}
        made_by = {"format_version": FORMAT_VERSION, "code_version": VERSION}
        plain: dict[str, Any] = json.loads(json.dumps({**settings, **made_by}))
        return plain

    @cached_property
    def config_sha256(self) -> str:
        """Hash of `config`."""
        return hashlib.sha256(to_json(self.config)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One split of one input, which becomes at most one text and one multimodal shard."""

    number: int
    input: int
    split: Split
    sample: int | None = None
    """Number of records to read, in dry runs; default: all."""

    @property
    def records(self) -> int:
        """Number of records to read."""
        return self.split.records if self.sample is None else self.sample


def open_input(path: str, *, format: str, template: Template | None, columns: Mapping[str, str]) -> Input:
    """Identify an input file and its format.

    Args:
        path: JSONL, JSON array, tar archive, Parquet or Arrow file.
        format: row of FORMATS, or `auto`.
        template: None means the default of the format.
        columns: other names of keys, by the name that the formats use.

    Raises:
        UsageError: the file is unreadable or of no known format, or its format cannot take the template.
        NoRecordsError: it is empty.
        DataError: the file is damaged, or its compression cannot be read.
    """
    try:
        if not os.path.isfile(path):
            raise UsageError(
                f"--input {path}: no such file; give JSONL, JSON, tar, Parquet or Arrow files, or folders of them"
            )
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(_ENDS)
            stream.seek(max(0, size - _ENDS))
            digest = hashlib.sha256(start + stream.read(_ENDS))
    except OSError as error:
        raise UsageError(f"--input {path}: cannot read ({error.strerror}); give a readable file") from error
    container = container_of(path, start=start)
    only = None if format == "auto" and container != "tar" else format
    format = choose_format(path, container=container, asked=format, columns=columns)
    only = None if only is None else format
    usual = FORMATS[format].template
    if template == "deepseek" and usual != "deepseek":
        raise UsageError(f"--template deepseek: {path} has format {format}, which has no turns; use plain or none")
    return Input(
        path=path,
        container=container,
        format=format,
        content=_content(path, container=container, format=format, start=start),
        only=only,
        template=template or usual,
        template_given=template is not None,
        size=size,
        ends_sha256=digest.hexdigest(),
    )


@lru_cache(maxsize=1)
def tokenizer_at(path: str) -> Tokenizer:
    """The tokenizer at a path, opened once per process, because a large vocabulary takes half a second."""
    return open_tokenizer(path)


def needs_image_token(tokenizer: str, *, where: str) -> UsageError:
    """Refuses a tokenizer of text alone for a record with an image."""
    return UsageError(
        f"--tokenizer {tokenizer}: has no {IMAGE_TOKEN} token in its vocabulary, but {where} has an image; "
        "add the token, or give only records without images"
    )


def plan_tasks(job: Job) -> list[Task]:
    """Divide the inputs; the tasks are the same for any number of workers and machines."""
    tasks: list[Task] = []
    left = job.limit
    total = sum(source.size for source in job.inputs)
    for number, source in enumerate(job.inputs):
        if left == 0:
            break
        least, most = _SPLIT_BYTES[source.content]
        size = min(max(total // _PARTS, least), most)
        for split in divide_file(source.path, container=source.container, size=size, limit=left):
            tasks.append(Task(number=len(tasks), input=number, split=split))
            left = None if left is None else left - split.records
    return tasks


def sampled(tasks: Sequence[Task], *, limit: int) -> list[Task]:
    """The tasks with `limit` records spread evenly over them: the first of each split, at least one of each input."""
    total = sum(task.split.records for task in tasks)
    chosen: list[Task] = []
    before, inputs = 0, set[int]()
    for task in tasks:
        after = before + task.split.records
        share = limit * after // total - limit * before // total
        before = after
        if task.input not in inputs:
            share = max(share, 1)
        if share:
            inputs.add(task.input)
            chosen.append(replace(task, sample=min(share, task.split.records)))
    return chosen


def _content(path: str, *, container: Container, format: str, start: bytes) -> Literal["text", "paths", "images"]:
    """What most bytes of a file hold, which decides the size of its splits."""
    if format == "obelics":
        return "paths"
    if container == "parquet":
        return "images" if set(IMAGE_KEYS) & set(schema_of(path).names) else "text"
    if container == "tar" or b"data:image/" in start:
        return "images"
    return "text" if format == "text" else "paths"
