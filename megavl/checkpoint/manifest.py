"""The manifest of a checkpoint: its content, and the size and sha256 of every file.

It is written last and verified first. Hashes guard against damage; `megavl.checkpoint.safe_unpickle` guards against
forged files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from megavl.config.errors import CheckpointError, one_line
from megavl.files.hashing import file_sha256
from megavl.foreign.parsing import read_json
from megavl.foreign.reading import regular_file_in

MANIFEST = "manifest.json"
FORMAT = "megavl-checkpoint"
VERSION = 1
HASHING_THREADS = 8
"""Files hashed at once; sha256 runs at 2 GB/s per core and releases the interpreter lock."""
LARGEST = 1 << 60
"""No iteration, number of ranks or size in bytes is larger."""
_LONGEST_NAME, _LONGEST_PART = 1000, 255
"""Characters of a file's name with its folders, and of one part; longer ones exist in no file system."""
_SHA256 = re.compile(r"[0-9a-f]{64}")

_verified: dict[tuple[Any, ...], dict[str, Any]] = {}


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def encode_manifest(
    *, iteration: int, world_size: int, content: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """Text of `manifest.json`; its own `digest` covers everything else in it."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": iteration,
        "world_size": world_size,
        "content": dict(content),
        "files": {name: dict(files[name]) for name in sorted(files)},
    }
    return json.dumps({**body, "digest": _digest(body)}, indent=1).encode() + b"\n"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint directory `path`, but none of its other files.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of an unknown version.
    """
    source = Path(path) / MANIFEST
    try:
        regular_file_in(Path(path), MANIFEST)
        raw = read_json(source)
    except FileNotFoundError:
        raise CheckpointError(f"{source}: missing; {path} is no complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: not readable as a manifest ({one_line(error)})") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CheckpointError(f"{source}: not a manifest of {FORMAT}")
    if raw.get("version") != VERSION:
        raise CheckpointError(f"{source}: version {_shown(raw.get('version'))}, this program reads version {VERSION}")
    body = {key: value for key, value in raw.items() if key != "digest"}
    if raw.get("digest") != _digest(body):
        raise CheckpointError(f"{source}: damaged, its content does not match its own digest")
    _check_form(raw, source)
    return raw


def _check_form(raw: Mapping[str, Any], source: Path) -> None:
    """Refuse a manifest that another program wrote, with a digest of its own."""
    for key, expected in {"iteration": int, "world_size": int, "content": dict, "files": dict}.items():
        value = raw.get(key)
        if not isinstance(value, expected) or expected is int and not _is_count(value):
            raise CheckpointError(f"{source}: damaged, {key} is {_shown(value)}")
    for name, record in raw["files"].items():
        if not safe_name(name):
            raise CheckpointError(f"{source}: refused file name {_shown(name)}, it leaves the directory")
        if len(name) > _LONGEST_NAME or max(map(len, PurePosixPath(name).parts)) > _LONGEST_PART:
            raise CheckpointError(f"{source}: refused file name {_shown(name)}, it is too long")
        size, sha256 = (record.get(key) if isinstance(record, dict) else None for key in ("size", "sha256"))
        if not _is_count(size) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise CheckpointError(f"{source}: damaged, files lists {_shown(name)} as {_shown(record)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _shown(value: object) -> str:
    return repr(value)[:100]


def verify(path: str | Path, *, skip_hash: bool = False) -> dict[str, Any]:
    """Compare every file of a checkpoint directory with the manifest.

    A directory that this process has hashed is not hashed again while its files keep size, inode and times.

    Args:
        skip_hash: check sizes only.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the first bad file, in name order, with the expected and the found value.
    """
    path = Path(path)
    manifest = check_sizes(path)
    if not skip_hash:
        _raise_first(find_damage(path, unverified(path, manifest)))
        remember_verified(path, manifest)
    return manifest


def check_sizes(path: Path) -> dict[str, Any]:
    """Compare the size of every file with the manifest, and return that.

    Raises:
        CheckpointError: as `verify`.
    """
    manifest = read_manifest(path)
    for name, record in manifest["files"].items():
        size = _size(path, name)
        if size != record["size"]:
            raise CheckpointError(f"{path / name}: {size} bytes, expected {record['size']}")
    return manifest


def unverified(path: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's records of all files, or of none if this process knows that their hashes are right."""
    files: dict[str, dict[str, Any]] = manifest["files"]
    return {} if _identity(path, manifest) in _verified else files


def check_small_files(path: Path) -> None:
    """Compare the hashes of all files but the shards, whose sizes must have been checked.

    Raises:
        CheckpointError: as `verify`.
    """
    files = read_manifest(path)["files"]
    _raise_first(find_damage(path, {name: files[name] for name in files if not name.endswith(".distcp")}))


def find_damage(path: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Compare the hashes of files with their records.

    Returns:
        A message by name of each file that differs.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with ThreadPoolExecutor(max_workers=HASHING_THREADS) as pool:
        found = dict(zip(files, pool.map(lambda name: _hash(path / name), files), strict=True))
    return {
        name: f"{path / name}: sha256 {found[name]}, expected {record['sha256']}; damaged"
        for name, record in files.items()
        if found[name] != record["sha256"]
    }


def _raise_first(damage: Mapping[str, str]) -> None:
    if damage:
        raise CheckpointError(damage[min(damage)])


def remember_verified(path: Path, manifest: dict[str, Any]) -> None:
    """Note that this job has just hashed every file of `path` for this manifest."""
    _verified[_identity(path, manifest)] = manifest


def safe_name(name: str) -> bool:
    """Whether a file name from a manifest or a caller stays inside its directory."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def _size(path: Path, name: str) -> int:
    try:
        file = regular_file_in(path, name)
        if file is None:
            raise CheckpointError(f"{path / name}: missing")
        return file.stat().st_size
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / name}: refused ({one_line(error)})") from error


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror})") from error


def _identity(path: Path, manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        states = [os.stat(path / name) for name in manifest["files"]]
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({one_line(error)})") from error
    return (
        str(path.resolve()),
        manifest["digest"],
        *((state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states),
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
