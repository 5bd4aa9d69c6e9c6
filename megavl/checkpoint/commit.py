"""The commit protocol: a checkpoint is written under a temporary name, and one rename makes it valid."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megavl.checkpoint.directory import check, checkpoint_name, temporary_name
from megavl.checkpoint.manifest import (
    MANIFEST,
    encode_manifest,
    file_record,
    read_manifest,
    remember_verified,
    safe_name,
)
from megavl.checkpoint.reader import require_usable
from megavl.checkpoint.safe_unpickle import BACKEND, BACKEND_MARK, COMMON, METADATA, safe_load
from megavl.config.errors import CheckpointError
from megavl.files.durable import copy_durably, replace_durably, set_aside, sync_directory, write_durably

_OWN = (MANIFEST, METADATA, COMMON, BACKEND)


def make_temporary(directory: Path, iteration: int) -> Path:
    """Create a fresh directory that a save writes into."""
    path = directory / temporary_name(iteration)
    path.mkdir()
    return path


def free_name(directory: Path, iteration: int, *, skip_hash: bool) -> None:
    """Free the name of the coming checkpoint: a directory of that name that no run could resume from is renamed.

    Raises:
        CheckpointError: a valid checkpoint has that name; it is never replaced.
    """
    path = directory / checkpoint_name(iteration)
    # A dangling link has a name, but does not exist.
    if not os.path.lexists(path):
        return
    try:
        check(path, skip_hash=skip_hash)
        require_usable(path)
    except CheckpointError:
        set_aside(path)
        return
    raise CheckpointError(f"{path}: a valid checkpoint of this iteration exists; use another directory or remove it")


def encode_common(common: Mapping[str, Any]) -> bytes:
    """The content of `common.pt`: the state that all ranks share.

    Raises:
        TypeError: it holds something else than plain values and tensors.
    """
    buffer = io.BytesIO()
    torch.save(dict(common), buffer)
    buffer.seek(0)
    try:
        safe_load(buffer, source=COMMON)
    except CheckpointError as error:
        raise TypeError(f"state: only plain values and tensors may stand outside shards: {error}") from None
    return buffer.getvalue()


def write_common(common: bytes, directory: Path) -> None:
    """Write `common.pt` and megatron-core's own mark (`metadata.json`)."""
    write_durably(directory / COMMON, common)
    write_durably(directory / BACKEND, json.dumps(BACKEND_MARK).encode())


def write_extra_files(temporary: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write the extra files of a checkpoint, such as the recipe and the tokenizer.

    Args:
        files: content or source file by name inside the checkpoint, `/` between folders.

    Raises:
        CheckpointError: a name leaves the directory or belongs to the format.
    """
    for name, source in files.items():
        if not safe_name(name) or name in _OWN or name.endswith(".distcp"):
            raise CheckpointError(f"files: {name!r} is no name for an extra file of a checkpoint")
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            write_durably(target, source)
        else:
            copy_durably(source, target)


def file_records(temporary: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files of the save, by name."""
    return {path.relative_to(temporary).as_posix(): file_record(path) for path in paths}


def non_shard_files(temporary: Path) -> list[Path]:
    """All files of the save but the shards."""
    return sorted(path for path in temporary.rglob("*") if path.is_file() and path.suffix != ".distcp")


def write_manifest(
    temporary: Path,
    *,
    iteration: int,
    world_size: int,
    content: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `manifest.json`, the last file, and sync the names in every folder."""
    manifest = encode_manifest(iteration=iteration, world_size=world_size, content=content, files=records)
    replace_durably(temporary / MANIFEST, manifest)
    for folder in {path.parent for path in temporary.rglob("*")}:
        sync_directory(folder)


def publish(temporary: Path, directory: Path, iteration: int) -> Path:
    """Commit: rename to the final name. If the storage does not confirm the rename, it is undone.

    Returns:
        The committed checkpoint.
    """
    final = directory / checkpoint_name(iteration)
    temporary.rename(final)
    try:
        sync_directory(directory)
    except OSError:
        final.rename(temporary)
        raise
    remember_verified(final, read_manifest(final))
    return final
