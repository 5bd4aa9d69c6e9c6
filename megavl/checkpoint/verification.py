"""Verification by all ranks: each of them hashes an equal part of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.checkpoint import collective_errors
from megavl.checkpoint.directory import check_name
from megavl.checkpoint.manifest import check_sizes, find_damage, remember_verified, unverified
from megavl.config.errors import CheckpointError


def verify_together(path: Path, *, skip_hash: bool = False, named: bool = False) -> None:
    """Compare every file of a checkpoint with its manifest, as `manifest.verify` does in one process. Collective.

    Args:
        skip_hash: check sizes only.
        named: compare the directory's name with the manifest too.

    Raises:
        CheckpointError: on every rank, naming the first bad file, with the expected and the found value.
    """
    known: list[dict[str, Any]] = []

    def sizes() -> dict[str, dict[str, Any]]:
        manifest = check_sizes(path)
        if named:
            check_name(path, manifest)
        known.append(manifest)
        return {} if skip_hash else unverified(path, manifest)

    files = collective_errors.on_rank_zero(sizes)
    if skip_hash or not files:
        return
    mine = _share(files, rank=collective_errors.rank(), world=collective_errors.world_size())
    parts = collective_errors.on_every_rank_for_long(lambda: find_damage(path, mine))
    damage = {name: text for part in parts for name, text in part.items()}
    if damage:
        raise CheckpointError(damage[min(damage)])
    collective_errors.on_rank_zero(lambda: remember_verified(path, known[0]))


def _share(files: Mapping[str, Mapping[str, Any]], *, rank: int, world: int) -> dict[str, Mapping[str, Any]]:
    """Files of one rank: the largest file goes to the rank that has least so far."""
    sizes = [0] * world
    share: dict[str, Mapping[str, Any]] = {}
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        least = sizes.index(min(sizes))
        sizes[least] += files[name]["size"]
        if least == rank:
            share[name] = files[name]
    return share
