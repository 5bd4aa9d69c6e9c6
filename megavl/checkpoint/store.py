"""The checkpoints of a run: saves that commit or leave no trace, search for the newest valid one, retention."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict

from megavl.checkpoint import collective_errors, commit
from megavl.checkpoint.directory import LATEST, apply_retention, check, recover, remove_uncommitted, update_latest
from megavl.checkpoint.directory import checkpoint_name as checkpoint_name
from megavl.checkpoint.fault import inject_fault
from megavl.checkpoint.manifest import read_manifest as read_manifest
from megavl.checkpoint.reader import require_usable
from megavl.checkpoint.shards import own_shards, write_shards
from megavl.checkpoint.state import load_state, split_state
from megavl.config.errors import CheckpointError, UsageError
from megavl.files.durable import storage_errors, write_durably

_HEADROOM = 1.2
_log = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints of one run in one directory. Every method, the constructor included, is collective."""

    def __init__(self, directory: str | Path, *, keep: int = 2, skip_hash: bool = False) -> None:
        """Open the directory, create it if needed, and remove the leftovers of interrupted saves.

        Args:
            directory: shared by all ranks.
            keep: number of newest valid checkpoints that retention keeps, at least 2.
            skip_hash: check only sizes, not hashes, wherever a checkpoint is verified.

        Raises:
            StorageError: the directory cannot be created or written.
        """
        if keep < 2:
            raise UsageError(f"checkpoint.keep: {keep} is too few; keep at least 2")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._skip_hash = skip_hash
        self._known_valid: set[Path] = set()
        collective_errors.on_rank_zero(self._open)

    def save(
        self,
        iteration: int,
        *,
        state: ShardedStateDict,
        content: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
    ) -> Path:
        """Write a checkpoint and return its directory after it is committed.

        A checkpoint that this store has saved or found before is not written a second time.

        Args:
            iteration: completed optimizer steps; becomes the name.
            state: sharded state dict. All other entries are plain values and tensors that are equal on all ranks. The
                model's keys begin with `model.`.
            content: JSON facts for the manifest, such as consumed samples and layout; taken from rank 0.
            files: content or source file by name inside the checkpoint; taken from rank 0.

        Raises:
            StorageError: the storage failed on some rank. Nothing of it is left; older checkpoints are untouched.
            CheckpointError: a valid checkpoint of this iteration exists, or the shards do not cover the state.
        """
        doing = f"{self._directory}: saving iteration {iteration}"
        me = collective_errors.rank()
        final = self._directory / checkpoint_name(iteration)
        if final in self._known_valid and collective_errors.on_rank_zero(lambda: self._is_valid(final)):
            return final

        def prepare() -> Path:
            json.dumps(dict(content))
            with storage_errors(doing):
                self._warn_if_short_of_space(size)
                commit.free_name(self._directory, iteration, skip_hash=self._skip_hash)
                return commit.make_temporary(self._directory, iteration)

        sharded, common, size = split_state(state)
        collective_errors.on_every_rank(lambda: inject_fault("before_mkdir", rank=me, step=iteration))
        temporary = collective_errors.on_rank_zero(prepare)
        try:
            write_shards(sharded, temporary, step=iteration)
            self._hash_and_list(temporary, iteration, common=common, content=content, files=files, doing=doing)
            self._publish(temporary, iteration, doing=doing)
        except BaseException:
            if me == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._known_valid.add(final)
        self._after_commit(final, iteration)
        return final

    def newest(self, *, allow_fresh: bool = False) -> Path | None:
        """Find the newest valid checkpoint; None if the directory is empty, as at the first start.

        Args:
            allow_fresh: return None also if all checkpoints are damaged.

        Raises:
            CheckpointError: the directory holds checkpoints or a tracker, but no valid checkpoint.
        """
        found = collective_errors.on_rank_zero(lambda: self._newest(allow_fresh))
        if found is not None:
            self._known_valid.add(found)
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
            try:
                write_durably(probe, b"")
            finally:
                probe.unlink(missing_ok=True)
            remove_uncommitted(self._directory)

    def _newest(self, allow_fresh: bool) -> Path | None:
        found = recover(self._directory, skip_hash=self._skip_hash, require=require_usable)
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

    def _hash_and_list(
        self,
        temporary: Path,
        iteration: int,
        *,
        common: StateDict,
        content: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
        doing: str,
    ) -> None:
        """Write rank 0's files, hash every file on the rank that wrote it, and list all in the manifest."""
        me = collective_errors.rank()

        def hash_own() -> dict[str, dict[str, Any]]:
            with storage_errors(f"{doing}: rank {me}"):
                inject_fault("after_shard", rank=me, step=iteration)
                paths = own_shards(temporary)
                if me == 0:
                    commit.write_common(common, temporary)
                    commit.write_extra_files(temporary, files)
                    paths += commit.non_shard_files(temporary)
                return commit.file_records(temporary, paths)

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
                inject_fault("after_manifest", rank=me, step=iteration)

        def rename() -> Path:
            with storage_errors(doing):
                return commit.publish(temporary, self._directory, iteration)

        # Nothing is committed unless every rank is still alive at this point.
        collective_errors.on_every_rank(ready)
        collective_errors.on_rank_zero(rename)

    def _after_commit(self, final: Path, iteration: int) -> None:
        me = collective_errors.rank()

        def tidy() -> None:
            update_latest(self._directory, final)
            apply_retention(self._directory, keep=self._keep, skip_hash=self._skip_hash, step=iteration)

        inject_fault("after_rename", rank=me, step=iteration)
        if me:
            inject_fault("mid_retention", rank=me, step=iteration)
        collective_errors.on_rank_zero(tidy)
