"""Finds the checkpoint at a path that a user gives, and reads the sizes of its model; needs no torch."""

from __future__ import annotations

from pathlib import Path

from megavl.checkpoint.directory import check, recover
from megavl.checkpoint.manifest import MANIFEST
from megavl.config.errors import CheckpointError, UsageError, one_line
from megavl.config.load import model_config_from_dict
from megavl.config.model import ModelConfig
from megavl.files.model_folders import describe
from megavl.foreign.parsing import read_json

MODEL_FILE = "model.json"


def resolve(path: str | Path, *, skip_hash: bool = False) -> Path:
    """Find and verify the checkpoint at a path given by the user.

    Args:
        path: checkpoint directory, or a directory of checkpoints, of which the newest valid one is taken.
        skip_hash: check sizes only, not hashes.

    Returns:
        The checkpoint directory.

    Raises:
        CheckpointError: nothing there, something else, or nothing valid. A damaged checkpoint is never replaced by an
            older one if `path` is the checkpoint itself.
    """
    path = Path(path)
    if path.is_file():
        raise CheckpointError(f"{path}: {describe(path)}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a checkpoint or the directory that holds them")
    if (path / MANIFEST).exists() or path.name.startswith("iter_"):
        check(path, skip_hash=skip_hash)
        return path
    found = recover(path, skip_hash=skip_hash)
    if found.path is None:
        other = None if found.rejected else describe(path)
        raise CheckpointError(f"{path}: {other}" if other else found.explain(path))
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
