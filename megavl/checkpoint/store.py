"""The checkpoints of a run: saves that commit or leave no trace, search for the newest valid one, retention."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict

from megavl.checkpoint import collective_errors
from megavl.checkpoint.background import HostBuffer, Task
from megavl.checkpoint.directory import (
    LATEST,
    Recovery,
    apply_retention,
    candidates,
    check,
    newest_usable,
    remove_uncommitted,
    tracker_problem,
    update_latest,
)
from megavl.checkpoint.directory import checkpoint_name as checkpoint_name
from megavl.checkpoint.fault import inject_fault
from megavl.checkpoint.manifest import read_manifest as read_manifest
from megavl.checkpoint.reader import require_usable
from megavl.checkpoint.save import Save
from megavl.checkpoint.state import SplitState, load_state
from megavl.checkpoint.verification import verify_together
from megavl.config.errors import CheckpointError, UsageError
from megavl.files.durable import storage_errors, write_durably

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
        self._division: SplitState | None = None
        self._buffer = HostBuffer()
        self._begun: tuple[Save, Task] | None = None
        self._retention: Task | None = None
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
        final = self._directory / checkpoint_name(iteration)
        if (save := self._prepare(iteration, state=state, content=content, files=files)) is None:
            return final
        self._complete(save, save.write)
        self._after_commit(final, iteration)
        return final

    def begin(
        self,
        iteration: int,
        *,
        state: ShardedStateDict,
        content: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
    ) -> None:
        """Copy a checkpoint to host memory, and let a thread write it; `finish` commits it.

        At most one save is under way. If the memory for the copy is not available, this waits for the writing.

        Args: as `save`.

        Raises:
            StorageError: the storage failed already.
            CheckpointError: as `save`.
        """
        assert self._begun is None, "a save is under way; finish it first"
        final = self._directory / checkpoint_name(iteration)
        if (save := self._prepare(iteration, state=state, content=content, files=files)) is None:
            return
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", collective_errors.world_size()))

        def copy() -> None:
            save.blocks = self._buffer.copy(save.blocks)

        try:
            room = all(collective_errors.on_every_rank(lambda: self._buffer.reserve(save.blocks, ranks=ranks)))
            if room:
                collective_errors.on_every_rank(copy)
        except BaseException:
            save.abandon()
            raise
        save.awaited = not room
        self._begun = save, (task := Task(save.write))
        if not room:
            if collective_errors.rank() == 0:
                _log.warning("%s: too little memory for a copy, so training waits until it is written", final)
            collective_errors.on_every_rank_for_long(task.wait)

    @property
    def begun(self) -> int | None:
        """Iteration of the save under way."""
        return self._begun[0].iteration if self._begun is not None else None

    def is_written(self) -> bool:
        """Whether this rank has written its part of the save under way, or failed to. Not collective."""
        return self._begun is None or self._begun[1].has_ended()

    def finish(self) -> Path:
        """Wait for the save under way and commit it.

        Returns:
            Its directory.

        Raises:
            StorageError: as `save`, also for what went wrong in the background.
        """
        assert self._begun is not None, "no save is under way"
        (save, task), self._begun = self._begun, None
        save.awaited = True
        self._complete(save, task.result)
        final = self._directory / checkpoint_name(save.iteration)
        self._after_commit(final, save.iteration, in_background=True)
        return final

    def _prepare(
        self,
        iteration: int,
        *,
        state: ShardedStateDict,
        content: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
    ) -> Save | None:
        """Prepare a save; None if it is a valid checkpoint already."""
        final = self._directory / checkpoint_name(iteration)
        collective_errors.on_rank_zero(self._end_retention)
        if final in self._known_valid and collective_errors.on_rank_zero(lambda: self._is_valid(final)):
            return None
        save, self._division = Save.prepare(
            self._directory,
            iteration,
            state=state,
            content=content,
            files=files,
            skip_hash=self._skip_hash,
            last=self._division,
        )
        return save

    def _complete(self, save: Save, write: Callable[[], None]) -> None:
        try:
            collective_errors.on_every_rank_for_long(write)
            self._known_valid.add(save.commit())
        except BaseException:
            save.abandon()
            raise

    def newest(self, *, allow_fresh: bool = False) -> Path | None:
        """Find the newest valid checkpoint; None if the directory is empty, as at the first start.

        Args:
            allow_fresh: return None also if all checkpoints are damaged.

        Raises:
            CheckpointError: the directory holds checkpoints or a tracker, but no valid checkpoint.
        """
        listed = collective_errors.on_rank_zero(lambda: candidates(self._directory))
        path, rejected = newest_usable(listed, self._check_together)
        collective_errors.on_rank_zero(lambda: self._report(path, rejected, allow_fresh=allow_fresh))
        if path is not None:
            self._known_valid.add(path)
        return path

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

    def _check_together(self, path: Path) -> None:
        verify_together(path, skip_hash=self._skip_hash, named=True)
        collective_errors.on_rank_zero(lambda: require_usable(path))

    def _report(self, path: Path | None, rejected: list[str], *, allow_fresh: bool) -> None:
        found = Recovery(path=path, rejected=rejected, tracker=tracker_problem(self._directory))
        for line in (*found.rejected, *filter(None, [found.tracker])):
            _log.warning("%s", line)
        if found.path is not None or not found.rejected and not (self._directory / LATEST).exists():
            return
        if not allow_fresh:
            raise CheckpointError(found.explain(self._directory))
        _log.warning("%s: starting anew, as allow_fresh asks", self._directory)

    def _is_valid(self, path: Path) -> bool:
        try:
            check(path, skip_hash=self._skip_hash)
        except CheckpointError:
            return False
        return True

    def _after_commit(self, final: Path, iteration: int, *, in_background: bool = False) -> None:
        me = collective_errors.rank()

        def retain() -> None:
            apply_retention(self._directory, keep=self._keep, skip_hash=self._skip_hash, step=iteration)

        def tidy() -> None:
            update_latest(self._directory, final)
            if in_background:
                self._retention = Task(retain)
            else:
                retain()

        inject_fault("after_rename", rank=me, step=iteration)
        if me:
            inject_fault("mid_retention", rank=me, step=iteration)
        collective_errors.on_rank_zero(tidy)

    def _end_retention(self) -> None:
        if self._retention is not None:
            task, self._retention = self._retention, None
            task.result()
