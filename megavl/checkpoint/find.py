"""Finds the checkpoint at a path that a user gives, and reads the sizes of its model; needs no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megavl.checkpoint.directory import check, recover
from megavl.checkpoint.manifest import MANIFEST
from megavl.config.errors import CheckpointError, UsageError, one_line
from megavl.config.load import model_config_from_dict, to_dict
from megavl.config.model import ModelConfig
from megavl.files.model_folders import describe
from megavl.foreign.parsing import read_json

MODEL_FILE = "model.json"
RECIPE_FILE = "recipe.yaml"
START = "start"
"""Key of a manifest's content: the checkpoint whose weights the run began with (`checkpoint`, `step`, and `digest` of
its manifest), or null for random weights. Older versions did not write it."""
_log = logging.getLogger(__name__)


def find(path: str | Path, *, skip_hash: bool = False, require: Callable[[Path], object] = lambda path: None) -> Path:
    """Find and verify the checkpoint at a path given by the user.

    Args:
        path: checkpoint directory, or a directory of checkpoints, of which the newest valid one is taken.
        skip_hash: check sizes only, not hashes.
        require: raises a `CheckpointError` for a checkpoint that cannot serve; an older one is then tried.

    Returns:
        The checkpoint directory; each newer one that is damaged gets a line in the log.

    Raises:
        CheckpointError: nothing there, something else, or nothing valid. A damaged checkpoint is never replaced by an
            older one if `path` is the checkpoint itself.
    """
    path = Path(path)
    if path.is_file():
        raise CheckpointError(f"{path}: {describe(path)}")
    if not path.is_dir():
        what = "not a directory" if os.path.lexists(path) else "no such directory"
        raise CheckpointError(f"{path}: {what}; give a checkpoint or the directory that holds them")
    if (path / MANIFEST).exists() or path.name.startswith("iter_"):
        check(path, skip_hash=skip_hash)
        require(path)
        return path
    found = recover(path, skip_hash=skip_hash, require=require)
    if found.path is None:
        other = None if found.rejected else describe(path)
        raise CheckpointError(f"{path}: {other}" if other else found.explain(path))
    for line in found.rejected:
        _log.warning("%s; %s is taken instead", line, found.path)
    return found.path


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the sizes of the model from `model.json` in a checkpoint directory."""
    source = Path(path) / MODEL_FILE
    try:
        raw = read_json(source)
        if not isinstance(raw, dict):
            raise ValueError(f"expected a mapping, found {type(raw).__name__}")
        return model_config_from_dict(raw, source=str(source))
    except (OSError, UsageError, ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: not readable ({one_line(error, limit=300)})") from error


def stored_model(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that `model: {from: init}` stands for: those of the run's newest checkpoint, else of `checkpoint.init`.

    Hashes are compared when the weights are loaded.

    Args:
        recipe: as `read_raw` gives it, not checked.

    Raises:
        CheckpointError: `checkpoint.init` is no valid checkpoint.
        UsageError: it is not stated.
    """
    checkpoint, run = (part if isinstance(part := recipe.get(name), Mapping) else {} for name in ("checkpoint", "run"))
    own = Path(str(checkpoint.get("dir") or f"{run.get('dir')}/checkpoints"))
    if (newest := recover(own, skip_hash=True, require=load_model_config).path) is not None:
        return to_dict(load_model_config(newest))
    init = checkpoint.get("init")
    if not isinstance(init, str):
        raise UsageError(
            "model.from: init takes the sizes of checkpoint.init, which is not set; name a checkpoint there, or give "
            "model.preset instead"
        )
    try:
        return to_dict(load_model_config(find(init, skip_hash=True, require=load_model_config)))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.init: {error}") from error
