"""Outputs of a step: an aligned line on the terminal, a JSON row, and scalars for TensorBoard."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megavl.data.batch import Modality
from megavl.data.mixture import sequences_before
from megavl.files.durable import replace_durably
from megavl.foreign.printing import visible
from megavl.planner.cost.flops import mfu, step_flops
from megavl.train.growing_file import GrowingFile, free_for_file, warn
from megavl.train.progress import Progress
from megavl.train.run_plan import RunPlan
from megavl.train.scalar_events import open_board
from megavl.train.step import StepResult
from megavl.train.trackers import Trackers


def metrics_row(
    plan: RunPlan, result: StepResult, *, modality: Modality, progress: Progress, lr: float, seconds: float
) -> dict[str, Any]:
    """One step's row of metrics.jsonl."""
    recipe, peak = plan.recipe, plan.peak_flops
    batch, length = recipe.training.global_batch_size, recipe.data.seq_length
    flops = step_flops(
        recipe.model,
        seq_length=length,
        sequences=batch,
        images=result.images,
        trainable_parts=recipe.trainable_parts,
    )
    return {
        "step": progress.step,
        "modality": modality,
        "loss": finite(result.loss),
        "loss_by_source": {
            source.name: finite(loss)
            for source, loss in zip(recipe.data.mixture, result.loss_by_source, strict=True)
            if loss is not None
        },
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": batch * length,
        "loss_tokens": result.loss_tokens,
        "images": result.images,
        "bad_samples": result.bad_samples,
        "step_time_s": round(seconds, 6),
        "tokens_per_s": round(batch * length / seconds, 3),
        "mfu": mfu(flops, seconds=seconds, devices=plan.scenario.devices, peak_flops=peak) if peak else None,
        "skipped": result.skipped,
        "consumed_samples": sequences_before(progress.step, size=batch, earlier=progress.earlier_batches),
    }


def finite(value: float) -> float | None:
    """The value, or None for one that JSON cannot hold."""
    return value if math.isfinite(value) else None


class MetricsLog:
    """Rank 0's log of a run. A failing storage costs rows, never the run."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        steps: int,
        start_step: int,
        tensorboard: bool,
        trackers: Trackers | None = None,
    ) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.steps, self._trackers = steps, trackers
        self._started, self._start_step = time.monotonic(), start_step
        self._rows = open_rows(self.path, step=start_step)
        self._board = open_board(Path(run_dir), start_step=start_step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's row and print its line."""
        self._rows.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        tqdm.write(visible(self._line(row), keep=""))
        found = scalars(row)
        if self._board is not None:
            self._board.write(found, step=row["step"])
        if self._trackers is not None:
            self._trackers.write(found, step=row["step"], kind="train")

    def picture(self, path: Path, *, step: int) -> None:
        """Send a picture of a step to the trackers, if it could be drawn."""
        if self._trackers is not None and path.is_file():
            self._trackers.picture(path, step=step)

    def close(self) -> str:
        """What could not be written to its end; empty if everything was. Nothing stays open between two rows."""
        files = [self._rows, *([self._board.file] if self._board else [])]
        return "; ".join(f"{file.path} ({file.trouble}, records lost: {file.lost})" for file in files if file.trouble)

    def _line(self, row: dict[str, Any]) -> str:
        done = row["step"] - self._start_step
        seconds = (time.monotonic() - self._started) / max(1, done) * (self.steps - row["step"])
        norm = "skipped" if row["skipped"] else f"{row['grad_norm']:7.3f}"
        loss = "not finite" if row["loss"] is None else f"{row['loss']:8.4f}"
        return (
            f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  {row['modality']:<10}  loss {loss}  "
            f"grad {norm}  lr {row['lr']:.2e}  {row['images']:>4} img  {row['step_time_s']:7.3f} s  "
            f"{row['tokens_per_s']:>9,.0f} tok/s  ETA {datetime.timedelta(seconds=round(seconds))}"
        )


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Names and values of a row for TensorBoard and trackers; what is not finite is left out."""
    found = {name: row[key] for name, key in _SCALARS.items() if row.get(key) is not None}
    found |= {f"train/loss/{name}": loss for name, loss in row.get("loss_by_source", {}).items() if loss is not None}
    return {**found, "data/multimodal": row["modality"] == "multimodal"}


_SCALARS = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/mfu": "mfu",
    "data/images": "images",
    "data/loss_tokens": "loss_tokens",
    "time/step_s": "step_time_s",
    "time/tokens_per_s": "tokens_per_s",
    "time/slowest_rank_s": "slowest_rank_s",
    "memory/peak_bytes": "peak_memory_bytes",
}


def open_rows(path: Path, *, step: int) -> GrowingFile:
    """A file of one JSON row a step. Rows of steps after `step`, which will run again, are moved out of it."""
    try:
        free_for_file(path)
        _discard_after(path, step)
    except OSError as error:
        warn(f"{path}: cannot be tidied ({error}); rows of repeated steps stay in it")
    return GrowingFile(path)


def _discard_after(path: Path, step: int) -> None:
    """Move rows of later steps to `NAME.discarded.jsonl`, so that each step has one row.

    Lines that are no rows, which a kill or a damage left, go there too.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    discarded: list[bytes] = []
    damaged = 0
    for line in path.read_bytes().splitlines():
        number = _step_of(line)
        damaged += number is None
        (kept if number is not None and number <= step else discarded).append(line + b"\n")
    if not discarded:
        return
    aside = path.with_name(f"{path.stem}.discarded.jsonl")
    if damaged:
        warn(f"{path}: {damaged} damaged lines are set aside in {aside.name}")
    free_for_file(aside)
    with aside.open("ab") as file:
        file.writelines(discarded)
    replace_durably(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """Step of a row; None if the line is no row."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
