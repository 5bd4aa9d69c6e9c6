"""Outputs of a step: an aligned line on the terminal, a JSON row, and scalars for TensorBoard."""

from __future__ import annotations

import datetime
import json
import math
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megavl.data.batch import Modality
from megavl.data.mixture import sequences_before
from megavl.files.durable import replace_durably
from megavl.planner.cost.flops import mfu, step_flops
from megavl.train.run_plan import RunPlan
from megavl.train.state import Progress
from megavl.train.step import StepResult


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
        "loss": result.loss if math.isfinite(result.loss) else None,
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


class MetricsLog:
    """Rank 0's log of a run."""

    def __init__(self, run_dir: str | Path, *, steps: int, start_step: int, tensorboard: bool) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.steps = steps
        self._started, self._start_step = time.monotonic(), start_step
        discard_rows_after(self.path, start_step)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._board = summary_writer(run_dir, purge_step=start_step + 1) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's row and print its line."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        tqdm.write(self._line(row))
        if self._board is not None:
            for name, key in _SCALARS.items():
                if row.get(key) is not None:
                    self._board.add_scalar(name, row[key], row["step"])
            self._board.add_scalar("data/multimodal", float(row["modality"] == "multimodal"), row["step"])

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._board is not None:
            self._board.close()

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


def discard_rows_after(path: Path, step: int) -> None:
    """Move rows of steps that will run again to `NAME.discarded.jsonl`, so that each step has one row."""
    if not path.exists():
        return
    kept: list[str] = []
    discarded: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            target = kept if json.loads(line)["step"] <= step else discarded
        except (json.JSONDecodeError, KeyError, TypeError):
            target = discarded  # truncated by a kill
        target.append(line + "\n")
    if not discarded:
        return
    with path.with_name(f"{path.stem}.discarded.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(discarded)
    replace_durably(path, "".join(kept).encode())


_SCALARS = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/mfu": "mfu",
    "data/images": "images",
    "data/loss_tokens": "loss_tokens",
    "time/step_s": "step_time_s",
    "time/tokens_per_s": "tokens_per_s",
}


def summary_writer(run_dir: str | Path, *, purge_step: int) -> Any:
    """TensorBoard's writer; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=purge_step)
