"""The store of a run: saves that commit or leave no trace, recovery of the newest good checkpoint, retention."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict

from megavl.checkpoint import collective_errors, commit
from megavl.checkpoint.directory import LATEST, check, point_latest, recover, retire, sweep
from megavl.checkpoint.directory import checkpoint_name as checkpoint_name
from megavl.checkpoint.durable import storage_errors
from megavl.checkpoint.fault import strike
from megavl.checkpoint.manifest import read_manifest as read_manifest
from megavl.checkpoint.shards import own_shards, write_shards
from megavl.checkpoint.state import load_state, split_state
from megavl.config.errors import CheckpointError, UsageError

_HEADROOM = 1.2
_log = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints of one run in one directory. Every method, the constructor included, is collective."""

    def __init__(self, directory: str | Path, *, keep: int = 2, skip_hash: bool = False) -> None:
        """Open the directory, creating it if needed, and remove what interrupted saves left behind.

        Args:
            directory: shared by all ranks.
            keep: newest valid checkpoints that retention leaves, at least 2.
            skip_hash: check sizes only, not hashes, wherever a checkpoint is verified.

        Raises:
            StorageError: the directory cannot be created or written.
        """
        if keep < 2:
            raise UsageError(f"checkpoint.keep: {keep} is too few; keep at least 2")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._skip_hash = skip_hash
        self._settled: set[Path] = set()
        collective_errors.on_rank_zero(self._open)

    def save(
        self,
        iteration: int,
        *,
        state: ShardedStateDict,
        content: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
    ) -> Path:
        """Write a checkpoint and return its directory once it is committed on disk.

        A checkpoint that this store saved or recovered before is not written a second time.

        Args:
            iteration: completed optimizer steps; becomes the name.
            state: sharded state dict. Outside its sharded entries it holds plain values and tensors that are equal on
                all ranks; `model.` is the prefix of the model's keys.
            content: JSON facts for the manifest (consumed samples, layout, dataset fingerprint, ...); rank 0's counts.
            files: content or source file by name inside the checkpoint; rank 0's counts.

        Raises:
            StorageError: the storage failed on some rank. Nothing is left behind; older checkpoints are untouched.
            CheckpointError: a valid checkpoint of this iteration exists, or the shards do not cover the state.
        """
        doing = f"{self._directory}: saving iteration {iteration}"
        me = collective_errors.rank()
        final = self._directory / checkpoint_name(iteration)
        if final in self._settled and collective_errors.on_rank_zero(lambda: self._is_valid(final)):
            return final

        def prepare() -> Path:
            json.dumps(dict(content))
            with storage_errors(doing):
                self._warn_if_short_of_space(size)
                commit.free_name(self._directory, iteration, skip_hash=self._skip_hash)
                return commit.make_temporary(self._directory, iteration)

        sharded, common, size = split_state(state)
        collective_errors.on_every_rank(lambda: strike("before_mkdir", rank=me, step=iteration))
        temporary = collective_errors.on_rank_zero(prepare)
        try:
            write_shards(sharded, temporary, step=iteration)
            self._seal(temporary, iteration, common=common, content=content, files=files, doing=doing)
            self._publish(temporary, iteration, doing=doing)
        except BaseException:
            if me == 0:
                commit.discard(temporary)
            raise
        self._settled.add(final)
        self._follow_up(final, iteration)
        return final

    def newest(self, *, allow_fresh: bool = False) -> Path | None:
        """Newest valid checkpoint; None for an empty directory, which is an ordinary first start.

        Args:
            allow_fresh: return None also where only damaged checkpoints exist.

        Raises:
            CheckpointError: the directory holds checkpoints or a tracker, but no valid checkpoint.
        """
        found = collective_errors.on_rank_zero(lambda: self._newest(allow_fresh))
        if found is not None:
            self._settled.add(found)
        return found

    def load(
        self, path: str | Path, state: ShardedStateDict, *, strict: bool = True, convert_dtype: bool = False
    ) -> StateDict:
        """Load a checkpoint of this or of another directory; see `megavl.checkpoint.state.load_state`."""
        return load_state(path, state, strict=strict, convert_dtype=convert_dtype, skip_hash=self._skip_hash)

    def _open(self) -> None:
        with storage_errors(f"{self._directory}: opening the checkpoint directory"):
            self._directory.mkdir(parents=True, exist_ok=True)
            probe = self._directory / f".probe-{uuid.uuid4().hex[:12]}"
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
                probe.unlink()
            sweep(self._directory)

    def _newest(self, allow_fresh: bool) -> Path | None:
        found = recover(self._directory, skip_hash=self._skip_hash)
        for line in (*found.rejected, *filter(None, [found.tracker])):
            _log.warning("%s", line)
        if found.path is not None:
            return found.path
        if not found.rejected and not (self._directory / LATEST).exists():
            return None
        if allow_fresh:
            _log.warning("%s: starting anew, as allow_fresh asks", self._directory)
            return None
        raise CheckpointError(found.explain(self._directory))

    def _is_valid(self, path: Path) -> bool:
        try:
            check(path, skip_hash=self._skip_hash)
        except CheckpointError:
            return False
        return True

    def _warn_if_short_of_space(self, size: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < _HEADROOM * size:
            _log.warning("%s: %d MB free, the save needs about %d MB", self._directory, free >> 20, size >> 20)

    def _seal(
        self,
        temporary: Path,
        iteration: int,
        *,
        common: StateDict,
        content: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
        doing: str,
    ) -> None:
        """Add what rank 0 writes, hash every file on the rank that wrote it, and list them in the manifest."""
        me = collective_errors.rank()

        def hash_own() -> dict[str, dict[str, Any]]:
            with storage_errors(f"{doing}: rank {me}"):
                strike("after_shard", rank=me, step=iteration)
                paths = own_shards(temporary)
                if me == 0:
                    commit.write_common(common, temporary)
                    commit.add_files(temporary, files)
                    paths += commit.other_files(temporary)
                return commit.records_of(temporary, paths)

        gathered = collective_errors.on_every_rank(hash_own)
        records = {name: record for part in gathered for name, record in part.items()}

        def manifest() -> None:
            with storage_errors(doing):
                commit.write_manifest(
                    temporary,
                    iteration=iteration,
                    world_size=collective_errors.world_size(),
                    content=content,
                    records=records,
                )

        collective_errors.on_rank_zero(manifest)

    def _publish(self, temporary: Path, iteration: int, *, doing: str) -> None:
        me = collective_errors.rank()

        def ready() -> None:
            with storage_errors(f"{doing}: rank {me}"):
                strike("after_manifest", rank=me, step=iteration)

        def rename() -> Path:
            with storage_errors(doing):
                return commit.publish(temporary, self._directory, iteration)

        # Nothing is committed unless every rank is still alive at this point.
        collective_errors.on_every_rank(ready)
        collective_errors.on_rank_zero(rename)

    def _follow_up(self, final: Path, iteration: int) -> None:
        me = collective_errors.rank()

        def tidy() -> None:
            point_latest(self._directory, final)
            retire(self._directory, keep=self._keep, skip_hash=self._skip_hash, step=iteration)

        strike("after_rename", rank=me, step=iteration)
        if me:
            strike("mid_retention", rank=me, step=iteration)
        collective_errors.on_rank_zero(tidy)
