"""Checkpoints as source and target of a conversion, with the files that only conversions need."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import save

from megavl.checkpoint.directory import candidates, checkpoint_name
from megavl.checkpoint.manifest import MANIFEST, read_manifest
from megavl.checkpoint.reader import load_model_config, open_model_tensors, resolve, tokenizer_folder
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.errors import UsageError
from megavl.config.model import ModelConfig
from megavl.convert.hf_read import is_hf_folder, open_hf_tensors, read_config, read_unused
from megavl.convert.hf_write import write_hf
from megavl.convert.model_card import CARD, model_card
from megavl.convert.run_facts import run_facts
from megavl.convert.table import DECODER, Export
from megavl.convert.weight_files import open_file
from megavl.weights.lazy import LazyTensor

PASSTHROUGH = "passthrough.safetensors"
"""File of a checkpoint that keeps the original format's unused parameters for a complete export."""

Progress = Callable[[Mapping[str, LazyTensor]], AbstractContextManager[Mapping[str, LazyTensor]]]
"""Gives the same tensors in a context that shows how many bytes of them were read."""


def open_unused(path: Path) -> Mapping[str, LazyTensor]:
    """Unused parameters of the original format that a checkpoint or a Hugging Face folder keeps, by original name."""
    if is_hf_folder(path):
        config, fmt = read_config(path)
        return read_unused(open_hf_tensors(path), config=config, fmt=fmt)
    return open_file(path / PASSTHROUGH) if PASSTHROUGH in read_manifest(path)["files"] else {}


def require_own_directory(directory: Path) -> None:
    """Refuse to write iteration 0 inside a model, or between the checkpoints of a run.

    Raises:
        UsageError: says what is there.
    """
    found = next((name for name in (MANIFEST, "config.json") if os.path.lexists(directory / name)), None)
    if found is not None:
        raise UsageError(
            f"OUT: {directory}: is itself a model, it has a {found}; name another directory for the new checkpoint"
        )
    other = next((path.name for path in candidates(directory) if path.name != checkpoint_name(0)), None)
    if other is not None:
        raise UsageError(
            f"OUT: {directory}: holds a run's checkpoints, such as {other}; name another directory for the new one"
        )


def write_checkpoint(
    directory: Path,
    *,
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    unused: Mapping[str, LazyTensor],
    files: Mapping[str, bytes | Path],
    progress: Progress,
) -> Path:
    """Write a checkpoint of iteration 0; arguments and errors as in `write_model_checkpoint`."""
    if unused:
        kept = save({name: tensor.load().contiguous() for name, tensor in unused.items()})
        files = {**files, PASSTHROUGH: kept}
    with progress(tensors) as source:
        pairs = ((name, tensor.load()) for name, tensor in source.items())
        return write_model_checkpoint(directory, config=config, tensors=pairs, files=files)


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    fmt: Export,
    dtype: str | None,
    progress: Progress,
    card_reports: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Path, Path]:
    """Write a checkpoint as a Hugging Face folder; other arguments and errors as in `write_hf`.

    Args:
        card_reports: evaluation reports by name for a model card; None writes no card.

    Returns:
        The checkpoint that was taken, and the folder.
    """
    # Of several checkpoints, the newest good one is known only after its files were read.
    path = resolve(path, skip_hash=(path / MANIFEST).exists())
    if is_hf_folder(path):
        raise UsageError(f"{path}: already a Hugging Face folder; run `megavl convert from-hf` on it first")
    tokenizer, config = tokenizer_folder(path), load_model_config(path)
    # The files are hashed while they are converted: both read them, and the disk is read once.
    with (
        ThreadPoolExecutor(max_workers=1) as pool,
        progress(open_model_tensors(path, skip_hash=True)) as tensors,
    ):
        verified = pool.submit(resolve, path)
        more_files = {}
        if card_reports is not None:
            facts = run_facts(path)
            count = sum(
                prod(tensor.shape) for name, tensor in tensors.items() if fmt != "llm" or name.startswith(DECODER)
            )
            card = model_card(config, fmt=fmt, parameters=count, facts=facts, reports=card_reports)
            more_files[CARD] = card.encode()
        folder = write_hf(
            out,
            config=config,
            tensors=tensors,
            fmt=fmt,
            tokenizer_dir=tokenizer,
            dtype=dtype,
            unused=open_unused(path),
            source=str(path),
            confirm=verified.result,
            more_files=more_files,
        )
    return path, folder
