"""The weights of a model on disk: a MegaVL checkpoint, the directory of checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megavl.checkpoint.manifest import MANIFEST
from megavl.checkpoint.reader import load_model_config, open_model_tensors, resolve, tokenizer_folder
from megavl.config.model import ModelConfig
from megavl.convert.hf_read import canonical_tensors, is_hf_folder, open_hf_tensors, read_config
from megavl.files.model_folders import hub_snapshot, require_whole_model
from megavl.weights.lazy import LazyTensor


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """A model on disk, of which no weight has been read yet."""

    path: Path
    """Checkpoint or Hugging Face folder."""
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    """Every parameter by canonical name."""
    tokenizer: Path
    """Folder of the tokenizer."""


def find_weights(path: str | Path, *, skip_hash: bool = False) -> WeightSource:
    """Find a model and read its sizes and the list of its weights.

    Args:
        path: see this module; of several checkpoints, the newest valid one is taken.
        skip_hash: compare only sizes of a checkpoint's files, not their hashes.

    Raises:
        CheckpointError: no model there, or damaged, hostile or foreign files.
    """
    path = hub_snapshot(path)
    if not (path / MANIFEST).is_file():
        require_whole_model(path)
    if is_hf_folder(path):
        config, fmt = read_config(path)
        tensors = canonical_tensors(open_hf_tensors(path), config=config, fmt=fmt)
        return WeightSource(path=path, config=config, tensors=tensors, tokenizer=path)
    path = resolve(path, skip_hash=skip_hash)
    config = load_model_config(path)
    return WeightSource(
        path=path,
        config=config,
        tensors=open_model_tensors(path, skip_hash=skip_hash),
        tokenizer=tokenizer_folder(path),
    )


def open_weights(path: str | Path) -> Mapping[str, LazyTensor]:
    """Every parameter of a model on disk by canonical name; errors as in `find_weights`."""
    return find_weights(path).tensors
