"""A save that goes on while the run trains: a copy in host memory, which a thread of this process writes.

The thread uses no collective, so nothing interleaves with those of training, and forks nothing, which CUDA would not
survive. All ranks commit together between two steps, or within an evaluation.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megavl.checkpoint.shards import Block

_ALIGNMENT = 64
"""Bytes; every type of numbers may begin at a multiple of it."""
_MEMORY = Path("/proc/meminfo")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class HostBuffer:
    """Memory of the host for the part of one save that this rank writes; the next save uses it again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, blocks: Sequence[Block], *, ranks: int) -> bool:
        """Get the memory for a copy; false where the host, of which each rank may take a part, has too little."""
        size, kept = _size(blocks), self._memory.numel()
        if size <= kept:
            return True
        if (_allocated(size) - kept) * ranks >= _available():
            return False
        # Freed first, so that both do not exist together; torch keeps pinned memory for later use.
        self._memory = torch.empty(0, dtype=torch.uint8)
        try:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        except RuntimeError:
            # So torch says that an allocation failed: other processes may have been faster, or little may be pinned.
            return False
        return True

    def copy(self, blocks: Sequence[Block]) -> list[Block]:
        """Copies of blocks for which memory is reserved; they are valid until the next call."""
        copies, position = [], 0
        for block in blocks:
            if block.shape is None:
                copies.append(replace(block, data=copy.deepcopy(block.data)))
                continue
            place = self._memory[position : position + block.data.nbytes]
            target = place.view(block.data.dtype).view(block.data.shape)
            target.copy_(block.data, non_blocking=True)
            copies.append(replace(block, data=target))
            position += _padded(block.data.nbytes)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


class Task:
    """A function that runs in a thread, which does not keep the process from ending."""

    def __init__(self, action: Callable[[], None]) -> None:
        """Start."""
        self._action = action
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="megavl-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error

    def has_ended(self) -> bool:
        """Whether it has returned or failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for its end."""
        self._thread.join()

    def result(self) -> None:
        """Wait for its end; raises its error."""
        self.wait()
        if self._error is not None:
            raise self._error


def _size(blocks: Sequence[Block]) -> int:
    return sum(_padded(block.data.nbytes) for block in blocks if block.shape is not None)


def _allocated(size: int) -> int:
    """Bytes that an allocation takes: torch makes pinned ones a power of two."""
    return 1 << (size - 1).bit_length() if torch.cuda.is_available() else size


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _available() -> int:
    """Bytes that this job could use more: of the host, and of the limits that SLURM or a container sets."""
    return min([_free_on_host(), *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """What each control group (version 2) of this process leaves; page cache that can be dropped is free."""
    try:
        (own,) = [line[3:] for line in _CGROUP.read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return
    group = _CGROUPS / own.strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_CGROUPS):
            return
        try:
            most, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if most != "max":
                yield int(most) - int(used) + int(pages["inactive_file"])
        except (OSError, ValueError, KeyError):
            continue


def _free_on_host() -> int:
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{_MEMORY}: names no MemAvailable")
