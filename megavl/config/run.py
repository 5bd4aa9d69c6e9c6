"""Where a run writes, and what it records besides its metrics."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from megavl.config.bounds import PathText, Positive
from megavl.config.model import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Output of the run."""

    dir: PathText
    """Directory of metrics.jsonl, exit_status.json, the resolved recipe and the TensorBoard files."""
    tensorboard: bool = True
    """Write scalars for TensorBoard if it is installed."""
    trackers: tuple[Literal["wandb", "mlflow", "tensorboard"], ...] = ()
    """What gets the same rows: Weights & Biases (extra `wandb`), MLflow (extra `mlflow`), TensorBoard (extra `board`).
    The services' own environment variables say where they are; without one, W&B keeps the run offline and MLflow in a
    database, both in run.dir. TensorBoard must then be installed, and is written whatever run.tensorboard says."""
    timeline_steps: tuple[Positive, ...] = ()
    """Steps whose timeline over all ranks is written to run.dir: `timeline/step_NNNNNN.json` (for Perfetto) and
    `.svg`."""
    profile_steps: tuple[Positive, ...] = ()
    """Steps that torch's profiler records: operators, kernels and memory. Each pipeline stage of the first replica
    writes a Chrome trace to run.dir: `profile/step_NNNNNN_rank_NNNNN.json.gz`."""
    memory_snapshot_step: Positive | None = None
    """Step whose allocations on CUDA the same ranks write to `profile/step_NNNNNN_rank_NNNNN.pickle` in run.dir, for
    https://pytorch.org/memory_viz. A run without CUDA refuses it."""

    @property
    def board(self) -> bool:
        """Whether scalars are written for TensorBoard."""
        return self.tensorboard or "tensorboard" in self.trackers
