"""Progress of a run, as a checkpoint's manifest states it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavl.checkpoint.manifest import LARGEST, MANIFEST, read_manifest
from megavl.config.errors import CheckpointError

_COUNTS = ("step", "bad_steps", "consumed_samples", "global_batch_size")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run; with the recipe it determines everything that follows."""

    step: int
    """Optimizer steps done, skipped ones included."""
    bad_steps: int
    """Skipped steps in a row."""
    earlier_batches: tuple[tuple[int, int], ...] = ()
    """(step, sequences): up to that step, steps had that many sequences. Empty unless a resume was forced to another
    batch size."""

    def after(self, *, skipped: bool) -> Progress:
        """Progress after one more step."""
        bad_steps = self.bad_steps + 1 if skipped else 0
        return dataclasses.replace(self, step=self.step + 1, bad_steps=bad_steps)

    @classmethod
    def of(cls, content: Mapping[str, Any], *, global_batch_size: int) -> Progress:
        """Progress that `read_content` returned, for steps of this many sequences from now on."""
        earlier = tuple((step, size) for step, size in content.get("earlier_batches", ()))
        if content["global_batch_size"] != global_batch_size:
            earlier += ((content["step"], content["global_batch_size"]),)
        return cls(step=content["step"], bad_steps=content["bad_steps"], earlier_batches=earlier)


def read_content(path: Path) -> dict[str, Any]:
    """Facts of a run in the manifest of its checkpoint; without `step`, the checkpoint holds weights only.

    Raises:
        CheckpointError: a value that no run writes.
    """
    manifest = read_manifest(path)
    content: dict[str, Any] = manifest["content"]
    if "step" not in content:
        return content
    for key in _COUNTS:
        _require(_is_count(content.get(key)), path, key, content.get(key))
    _require(content["step"] == manifest["iteration"], path, "step", content["step"])
    _require(content["global_batch_size"] > 0, path, "global_batch_size", 0)
    earlier, last = content.get("earlier_batches", []), 0
    _require(isinstance(earlier, list), path, "earlier_batches", earlier)
    for pair in earlier:
        right = isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair))
        _require(right and last < pair[0] <= content["step"] and pair[1] > 0, path, "earlier_batches", earlier)
        last = pair[0]
    return content


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _require(right: bool, path: Path, key: str, value: object) -> None:
    if not right:
        raise CheckpointError(
            f"{path / MANIFEST}: content.{key} is {repr(value)[:100]}, which no run writes; use another checkpoint"
        )
