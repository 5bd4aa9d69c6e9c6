"""What one preprocessing run makes: inputs, settings, and the units of work that follow from them alone."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from data_tools.readers.formats import DEFAULT_TEMPLATES, READERS, recognise
from data_tools.readers.stretches import Stretch, divide, records
from megavl.config.errors import UsageError
from megavl.config.presets import IMAGE_PRESETS, ImageGeometry
from megavl.data.image import Verification
from megavl.data.manifest import FORMAT_VERSION, PackSettings, to_json
from megavl.data.template import Template

_PARTS = 64
_TEXT_STRETCH = (256 << 10, 256 << 20)
_IMAGE_STRETCH = (64 << 10, 8 << 20)
"""Bytes of input per shard, least and most; a record with images stands for far more output than its own bytes."""
_SAMPLED = 100
"""Records looked at to recognise a format."""
_ENDS = 64 << 10
"""Bytes at either end of an input that identify it."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input file."""

    path: str
    format: str
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
    verify: Verification
    max_aspect: float
    system_prompt: str
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
        apart = {"output", "fail_on_error", "dry_run", "tokenizer"}
        settings = {key: value for key, value in asdict(self).items() if key not in apart}
        plain: dict[str, Any] = json.loads(json.dumps({**settings, "format_version": FORMAT_VERSION}))
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


def open_input(path: str, *, format: str, template: Template | None) -> Input:
    """Look at an input file.

    Args:
        path: JSONL or JSON array.
        format: row of READERS, or `auto`.
        template: default: the format's own.

    Raises:
        UsageError: unreadable, empty, of no known format, or of one that cannot take the template.
    """
    try:
        if not os.path.isfile(path):
            raise UsageError(f"--input {path}: no such file; give JSONL or JSON files")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest = hashlib.sha256(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
    except OSError as error:
        raise UsageError(f"--input {path}: cannot read ({error.strerror}); give a readable file") from error
    if format == "auto":
        format = _recognise_file(path)
    template = template or DEFAULT_TEMPLATES[format]
    if template == "deepseek" and DEFAULT_TEMPLATES[format] != "deepseek":
        raise UsageError(f"--template deepseek: {path} has format {format}, which has no turns; use plain or none")
    return Input(path=path, format=format, template=template, size=size, ends_sha256=digest.hexdigest())


def plan_units(job: Job) -> list[Unit]:
    """Divide the inputs; the same units for any number of workers and tasks."""
    units: list[Unit] = []
    left = job.limit
    for number, source in enumerate(job.inputs):
        least, most = _TEXT_STRETCH if source.format == "text" else _IMAGE_STRETCH
        size = min(max(source.size // _PARTS, least), most)
        for stretch in divide(source.path, size=size, limit=left) if left is None or left > 0 else ():
            units.append(Unit(number=len(units), input=number, stretch=stretch))
            left = None if left is None else left - stretch.records
    return units


def _recognise_file(path: str) -> str:
    found = ""
    for stretch in divide(path, size=1 << 30, limit=_SAMPLED):
        for _, raw in records(stretch):
            try:
                content = json.loads(raw or b"")
            except (ValueError, RecursionError):
                continue
            if name := recognise(content):
                return name
            found = found or (f"keys {', '.join(list(content)[:8])}" if isinstance(content, dict) else "no objects")
    raise UsageError(
        f"--input {path}: format not recognised (its records have {found or 'no valid JSON'}); "
        f"known formats are {', '.join(READERS)}, named by --format"
    )
