"""One save: prepared by all ranks together, written by each alone, committed together."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megavl.checkpoint import collective_errors, commit
from megavl.checkpoint.fault import inject_fault
from megavl.checkpoint.safe_unpickle import METADATA, check_metadata
from megavl.checkpoint.shards import Block, Written, metadata_of, own_blocks, write_blocks
from megavl.checkpoint.state import SplitState, split_state
from megavl.files import activity
from megavl.files.durable import storage_errors, write_durably

_HEADROOM = 1.2
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Save:
    """A save under way. The ranks call `write` and `commit` once each, in this order."""

    directory: Path
    iteration: int
    temporary: Path
    blocks: list[Block]
    """What this rank writes."""
    common: bytes
    """Content of `common.pt`, on rank 0."""
    content: Mapping[str, Any]
    files: Mapping[str, bytes | Path]
    awaited: bool = True
    """Whether the run waits for what is written, so that its watchdog counts it as progress."""
    _written: list[Written] = field(default_factory=list)
    _records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        directory: Path,
        iteration: int,
        *,
        state: ShardedStateDict,
        content: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
        skip_hash: bool,
        last: SplitState | None,
    ) -> tuple[Save, SplitState]:
        """Check the state, divide it among the ranks, and make the temporary directory. Collective.

        Args: as `CheckpointStore.save`.
            last: the division of the save before.

        Returns:
            The save, and its division without the state.
        """
        me, split, common = collective_errors.rank(), split_state(state, last=last), []

        def make() -> Path:
            json.dumps(dict(content))
            common.append(commit.encode_common(split.common))
            with storage_errors(_doing(directory, iteration)):
                _warn_if_short_of_space(directory, split.size)
                commit.free_name(directory, iteration, skip_hash=skip_hash)
                return commit.make_temporary(directory, iteration)

        collective_errors.on_every_rank(lambda: inject_fault("before_mkdir", rank=me, step=iteration))
        temporary = collective_errors.on_rank_zero(make)
        save = cls(
            directory=directory,
            iteration=iteration,
            temporary=temporary,
            blocks=own_blocks(split.entries, split.parts, rank=me),
            common=b"".join(common),
            content=content,
            files=files,
        )
        return save, replace(split, entries=[], common={})

    def write(self) -> None:
        """Write and hash this rank's files. Not collective.

        Raises:
            StorageError: the storage failed.
        """
        me, step = collective_errors.rank(), self.iteration
        with storage_errors(f"{self.temporary}: rank {me} writing its shard"):
            written = write_blocks(self.blocks, self.temporary, rank=me, step=step, note=self._note)
            self._written, self._records = written
            self.blocks = []
        with storage_errors(f"{_doing(self.directory, step)}: rank {me}"):
            inject_fault("after_shard", rank=me, step=step)
            if me == 0:
                commit.write_common(self.common, self.temporary)
                commit.write_extra_files(self.temporary, self.files)
                self._records |= commit.file_records(self.temporary, commit.non_shard_files(self.temporary))

    def _note(self) -> None:
        if self.awaited:
            activity.note()

    def commit(self) -> Path:
        """List all files in the manifest, and give the checkpoint its name. Collective.

        Returns:
            The checkpoint.

        Raises:
            StorageError: the storage failed on some rank.
        """
        me, step, doing = collective_errors.rank(), self.iteration, _doing(self.directory, self.iteration)
        gathered = collective_errors.on_every_rank(lambda: (self._written, self._records))

        def list_all() -> None:
            with storage_errors(doing):
                metadata = metadata_of([written for written, _ in gathered])
                # What no load would accept is never committed, such as a share that is missing.
                check_metadata(self.temporary, metadata)
                # Without a path or a random number, so that equal states give equal bytes in any directory.
                write_durably(self.temporary / METADATA, pickle.dumps(metadata))
                records = {name: record for _, part in gathered for name, record in part.items()}
                commit.write_manifest(
                    self.temporary,
                    iteration=step,
                    world_size=collective_errors.world_size(),
                    content=self.content,
                    records=records | commit.file_records(self.temporary, [self.temporary / METADATA]),
                )

        def ready() -> None:
            with storage_errors(f"{doing}: rank {me}"):
                inject_fault("after_manifest", rank=me, step=step)

        def rename() -> Path:
            with storage_errors(doing):
                return commit.publish(self.temporary, self.directory, step)

        collective_errors.on_rank_zero(list_all)
        # Nothing is committed unless every rank is still alive at this point.
        collective_errors.on_every_rank(ready)
        return collective_errors.on_rank_zero(rename)

    def abandon(self) -> None:
        """Remove what was written, on rank 0. Not collective."""
        if collective_errors.rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)


def _doing(directory: Path, iteration: int) -> str:
    return f"{directory}: saving iteration {iteration}"


def _warn_if_short_of_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < _HEADROOM * size:
        _log.warning("%s: %d MB free, the save needs about %d MB", directory, free >> 20, size >> 20)
