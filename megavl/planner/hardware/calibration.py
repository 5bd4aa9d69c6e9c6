"""Measured seconds of every block on a real device: the file that `megavl plan --calibrate` writes and `plan` reads.

A file belongs to one device, model, sequence length, precision and trained set. It holds an entry for every measured
(tensor, micro-batch, recompute, processes). `megavl/train/profile/calibrate.py` measures them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megavl.config.errors import UsageError
from megavl.config.model import STRICT, ModelConfig
from megavl.config.recipe import Recipe
from megavl.foreign.parsing import JSON_FILE
from megavl.foreign.reading import read_limited
from megavl.planner.hardware.devices import Device, known_device

FORMAT = 1
"""Version of the file."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Seconds:
    """A block's passes over one micro-batch: lower quartiles, since other programs on the machine only add time."""

    forward: float
    backward: float


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KindEntry:
    """One micro-batch of one modality."""

    embedding: Seconds
    layer: Seconds
    """One decoder layer."""
    head: Seconds
    """Final norm, output layer and loss."""
    loading: float
    """Waiting for one micro-batch's data."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VisionEntry:
    """Encoders and adaptor for a number of images."""

    towers: Seconds
    adaptor: Seconds


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Entry:
    """Measurements of one layout."""

    tensor: int
    processes: int
    """Ranks that computed at the same time on this machine."""
    sequence_parallel: bool
    micro_batch_size: int
    recompute: str
    """`recompute_key`."""
    text: KindEntry
    multimodal: KindEntry | None = None
    """None if the recipe has no multimodal steps."""
    images: float = 0.0
    """Mean number of images of the measured multimodal micro-batches."""
    vision: VisionEntry | None = None
    """Of `images` images."""
    one_image: VisionEntry | None = None
    towers: dict[str, float] = field(default_factory=dict)
    """Forward seconds of SAM and SigLIP for `images` images."""
    update_s_per_parameter: float
    """Optimizer, per trained parameter of the rank."""
    step_s: float
    """Fixed costs of a step: zeroing buffers, exchanging totals."""
    transfer_s: float | None = None
    """Sending one micro-batch's hidden states to another rank; None for one process."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Calibration:
    """A file of measurements."""

    format: int = FORMAT
    device: str
    """Name of the device; only printed."""
    shared_cores: bool
    """Whether ranks share the machine's cores and slow each other down."""
    model: str
    """`model_key`."""
    seq_length: int
    precision: str
    trained: tuple[str, ...]
    data: str
    """`recipe` for the recipe's data, `synthetic` for random micro-batches with one document per sequence."""
    versions: dict[str, str]
    entries: tuple[Entry, ...]


def model_key(model: ModelConfig) -> str:
    """Preset and a digest of all sizes except the number of decoder layers, by which the planner multiplies."""
    sizes = dataclasses.asdict(model)
    sizes["llm"].pop("num_layers")
    for name in ("eos_token_ids", "system_prompt"):
        sizes.pop(name)
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]
    return f"{model.preset}-{digest}"


def recompute_key(recipe: Recipe) -> str:
    """Recompute settings as one word."""
    recompute = recipe.recompute
    detail = {
        "none": "",
        "selective": f":{'+'.join(recompute.modules)}",
        "full": f":{recompute.num_layers}",
    }[recompute.granularity]
    return f"{recompute.granularity}{detail}{' vision' if recompute.vision else ''}"


def read_calibration(path: str | Path) -> Calibration:
    """Read and check a file.

    Raises:
        UsageError: missing, not JSON, or not a calibration of this version.
    """
    try:
        text = read_limited(path, limit=JSON_FILE.size).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--calibration: cannot read {path}: {error}") from error
    try:
        found = TypeAdapter(Calibration).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(
            f"--calibration: {path}: {key}: {first['msg']}; write it anew with `megavl plan ... --calibrate {path}`"
        ) from error
    if found.format != FORMAT:
        raise UsageError(
            f"--calibration: {path} has format {found.format}, this version reads {FORMAT}; measure it anew"
        )
    return found


def write_calibration(path: str | Path, calibration: Calibration) -> None:
    """Write a file atomically.

    Raises:
        UsageError: it cannot be written.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.tmp")
    try:
        draft.write_text(json.dumps(dataclasses.asdict(calibration), indent=1) + "\n", encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise UsageError(f"--calibrate: cannot write {path}: {error}; choose a writable place") from error


def merge(old: Calibration | None, new: Calibration, *, path: str | Path) -> Calibration:
    """`new`, plus the entries of `old` that it does not measure again.

    Raises:
        UsageError: `old` belongs to another device, model or data.
    """
    if old is None:
        return new
    for name in ("device", "model", "seq_length", "precision", "trained", "data"):
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise UsageError(
                f"--calibrate: {path} holds measurements of {name} {before!r}, this run has {now!r}; use another file"
            )
    keys = {_key(entry) for entry in new.entries}
    kept = tuple(entry for entry in old.entries if _key(entry) not in keys)
    return dataclasses.replace(new, entries=(*kept, *new.entries))


def check_calibration(calibration: Calibration, recipe: Recipe, *, path: str | Path) -> None:
    """Refuse a file that was measured for something else.

    Raises:
        UsageError: with the first difference.
    """
    wanted: dict[str, Any] = {
        "model": model_key(recipe.model),
        "seq_length": recipe.data.seq_length,
        "precision": recipe.training.precision,
        "trained": tuple(recipe.trainable_parts),
    }
    for name, value in wanted.items():
        found = getattr(calibration, name)
        if found != value:
            raise UsageError(
                f"--calibration: {path} was measured for {name} {found!r}, the recipe has {value!r}; measure this "
                "recipe with `megavl plan ... --calibrate FILE`"
            )


def check_device(calibration: Calibration, device: Device, *, path: str | Path) -> None:
    """Refuse a file from another kind of device than the one whose memory, links and peak the plan uses.

    Raises:
        UsageError: with both names.
    """
    known = known_device(calibration.device)
    if known is not None and known.name != device.name:
        raise UsageError(
            f"--calibration: {path} was measured on {calibration.device!r}, --device is {device.name}; use "
            f"--device {known.name}"
        )


def _key(entry: Entry) -> tuple[object, ...]:
    return entry.tensor, entry.processes, entry.sequence_parallel, entry.micro_batch_size, entry.recompute
