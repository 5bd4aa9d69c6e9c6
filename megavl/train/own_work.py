"""How long each rank works on its own part of a step, and the memory it needs; the largest of both go to the metrics.

All ranks leave a step together, so the step's time does not tell which one the others wait for.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.distributed as dist

from megavl.parallel import cpu_runtime

_RANKS = 1 << 20
"""More than any run has ranks; a value and its rank share one integer."""


class OwnWork:
    """Times this rank from the start of a step to the end of its last backward pass.

    It includes loading the data, and in a pipeline waiting for other stages; not the reduction of gradients and the
    update. On CUDA the times are events, so nothing waits for the device.
    """

    def __init__(self) -> None:
        self._begin: Any = None
        self._end: Any = None

    def begin(self) -> None:
        """The step starts."""
        self._begin = self._end = _now()

    def end(self) -> None:
        """The last backward pass is done, or queued on the device."""
        self._end = _now()

    def seconds(self) -> float:
        """Time of the step that was timed last; on CUDA the device must have finished it."""
        if torch.cuda.is_available():
            return float(self._begin.elapsed_time(self._end)) / 1e3
        return float(self._end - self._begin)


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_memory_bytes() -> int:
    """Largest memory of this rank so far, bytes: tensors on CUDA, else the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slowest_rank(work: OwnWork) -> dict[str, Any]:
    """Fields of `metrics.jsonl`: the slowest rank with its time, and the largest peak memory with its rank. Collective.

    Returns:
        `slowest_rank_s`, `slowest_rank`, `peak_memory_bytes`, `peak_memory_rank`.
    """
    rank = dist.get_rank()
    values = torch.tensor([round(1e6 * work.seconds()), peak_memory_bytes()], dtype=torch.int64)
    largest = (values * _RANKS + rank).to(cpu_runtime.device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    (micros, slowest), (peak, largest_rank) = (divmod(value, _RANKS) for value in largest.tolist())
    return {
        "slowest_rank_s": micros / 1e6,
        "slowest_rank": slowest,
        "peak_memory_bytes": peak,
        "peak_memory_rank": largest_rank,
    }
