"""`data.grouping: sequence` trains alike on one replica, and on two of which one has no image and all ranks encode.

The second run also shows that a training process makes its process groups once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.noted_groups import check_groups_made_once, run_noted
from tests.tiny_run import metrics

SETTINGS = (
    *("data.grouping=sequence", "data.multimodal_fraction=0.25", "training.steps=5", "checkpoint.interval=100"),
    *("training.micro_batch_size=1", "training.train=[llm,adaptor,siglip]", "optimizer.warmup_steps=1"),
    *("parallel.tensor=1", "parallel.pipeline=2", "parallel.layout=[2,2]"),
)


def losses(dataset: Path, run: Path, *settings: str, processes: int) -> list[float]:
    done = run_noted(dataset, run, *SETTINGS, *settings, processes=processes)
    assert done.returncode == 0, done.stderr
    rows = metrics(run)
    # One of four sequences has images.
    assert all(row["modality"] == "multimodal" and 0 < row["images"] <= 4 for row in rows)
    return [row["loss"] for row in rows]


def test_replicas_without_images_train_alike(dataset: Path, tmp_path: Path) -> None:
    alone = losses(dataset, tmp_path / "alone", processes=2)
    more = ("evaluation.interval=2", f"evaluation.held_out=[{dataset}/shards]", "evaluation.held_out_sequences=2")
    spread = losses(dataset, tmp_path / "spread", "parallel.vision=split_all", *more, processes=4)
    assert spread == pytest.approx(alone, rel=1e-5)
    assert [row["step"] for row in metrics(tmp_path / "spread", "evaluation.jsonl")] == [2, 4, 5]
    check_groups_made_once(tmp_path / "spread", processes=4)
