"""What torch's profiler and CUDA's allocator record of chosen steps, as files in the run's directory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megavl.config.errors import UsageError
from megavl.config.run import RunConfig
from megavl.foreign.printing import say
from megavl.train.run_plan import RunPlan

FOLDER = "profile"
"""In run.dir."""
_ALLOCATIONS = 1_000_000
"""Most allocations and releases that a snapshot keeps."""


def require_traceable(run: RunConfig) -> None:
    """Refuse a memory snapshot where there is no allocator that keeps one.

    Raises:
        UsageError: `run.memory_snapshot_step` without CUDA.
    """
    if run.memory_snapshot_step is not None and not torch.cuda.is_available():
        raise UsageError(
            f"run.memory_snapshot_step: {run.memory_snapshot_step} needs CUDA, which is not available here; leave it "
            "out, or use run.profile_steps, whose traces show memory too"
        )


class StepTraces:
    """Records the steps of `run.profile_steps` and `run.memory_snapshot_step`; other steps pass through untouched.

    One rank of each pipeline stage in the first replica writes: the others do the same work, and their files are large.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._run, position = plan.recipe.run, plan.position
        self._rank = position.rank
        self._writes = position.dp_rank == 0 and position.tp_rank == 0
        self._profiler: profile | None = None
        self._step = 0

    def begin(self, step: int) -> None:
        """Start to record if this step is named."""
        self._step = step
        if not self._writes:
            return
        if step == self._run.memory_snapshot_step:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        if step in self._run.profile_steps:
            on_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *on_cuda], profile_memory=True)
            self._profiler.start()

    def end(self, **_: Any) -> None:
        """Write what was recorded and say where; a full disk must not end a run over a trace."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            self._write("run.profile_steps", ".json.gz", profiler.export_chrome_trace)
        if self._writes and self._step == self._run.memory_snapshot_step:
            self._write("run.memory_snapshot_step", ".pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str, suffix: str, write: Any) -> None:
        path = Path(self._run.dir, FOLDER, f"step_{self._step:06d}_rank_{self._rank:05d}{suffix}")
        partial = path.with_name(f".{path.name.removesuffix(suffix)}.partial{suffix}")
        try:
            path.parent.mkdir(exist_ok=True)
            write(str(partial))
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            say(f"warning: {name}: cannot write {path}: {error}; training goes on without it")
            return
        say(f"{name}: step {self._step} of rank {self._rank}: {path}")
