"""Recorded steps of real processes: every pass once in megatron-core's order, and unchanged losses."""

from __future__ import annotations

import gzip
import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megavl.planner.schedule import Compute, passes
from tests.tiny_run import metrics, run_training

STEPS, MICRO_BATCHES = 6, 4
SIZES = (
    *("parallel.tensor=1", "parallel.pipeline=2", f"training.steps={STEPS}", "checkpoint.interval=100"),
    *(f"training.global_batch_size={MICRO_BATCHES}", "training.micro_batch_size=1"),
)
EVERY = f"run.timeline_steps={list(range(1, STEPS + 1))}"
# Traced steps are slow, and on a busy machine they outlast the minute of the tiny recipes.
TRACED = ("run.profile_steps=[2,4]", "parallel.timeout_s=600")
# Clocks are read one after the other and written with six digits.
TINY = 1e-4


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of a run without recording."""
    run = tmp_path_factory.mktemp("plain")
    done = run_training(dataset, run, *SIZES, "parallel.layout=[2,2]", processes=2)
    assert done.returncode == 0, done.stderr
    assert not (run / "timeline").exists()
    return metrics(run)


@pytest.fixture(scope="module")
def recorded(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with every step recorded."""
    run = tmp_path_factory.mktemp("recorded")
    done = run_training(dataset, run, *SIZES, "parallel.layout=[2,2]", EVERY, *TRACED, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"timeline of step {STEPS}: {run}/timeline/step_{STEPS:06d}.svg" in done.stdout
    return run


def test_recording_changes_no_loss(plain: list[dict[str, Any]], recorded: Path) -> None:
    rows = metrics(recorded)
    for name in ("loss", "grad_norm", "images"):
        assert [row[name] for row in rows] == [row[name] for row in plain]
    assert {row["modality"] for row in rows} == {"text", "multimodal"}


def test_each_stage_writes_its_profiler_trace(recorded: Path) -> None:
    folder = recorded / "profile"
    found = sorted(path.name for path in folder.iterdir())
    assert found == [f"step_{step:06d}_rank_{rank:05d}.json.gz" for step in (2, 4) for rank in (0, 1)]
    for rank, operator in ((0, "aten::mkldnn_convolution"), (1, "_VocabParallelLossBackward")):
        events = json.loads(gzip.decompress((folder / f"step_000002_rank_{rank:05d}.json.gz").read_bytes()))
        names = {event.get("name", "") for event in events["traceEvents"]}
        assert "aten::mm" in names and "[memory]" in names
        assert any(operator in name for name in names)


def test_metrics_name_the_slowest_rank(plain: list[dict[str, Any]]) -> None:
    for row in plain:
        assert 0 < row["slowest_rank_s"] <= row["step_time_s"] + TINY
        assert row["slowest_rank"] in (0, 1) and row["peak_memory_rank"] in (0, 1)
        assert row["peak_memory_bytes"] > 1e8
    peaks = [row["peak_memory_bytes"] for row in plain]
    assert peaks == sorted(peaks)


def test_every_pass_occurs_once_in_schedule_order(recorded: Path) -> None:
    for step in range(1, STEPS + 1):
        check_order(read(recorded, step), virtual=1)


def test_parts_fill_the_step_without_overlap(recorded: Path) -> None:
    for step, row in enumerate(metrics(recorded), start=1):
        rows = read(recorded, step)
        assert len(rows) == 2
        for boxes in rows.values():
            check_times(boxes, step_s=row["step_time_s"])


def test_encoders_and_head_stand_on_their_stages(recorded: Path) -> None:
    for step, row in enumerate(metrics(recorded), start=1):
        rows = read(recorded, step)
        blocks = {rank: {box["cat"] for box in boxes} for rank, boxes in rows.items()}
        both = {"decoder forward", "decoder backward", "waiting", "loading", "gradient reduction", "optimizer"}
        encoders, head = {"encoders forward", "encoders backward"}, {"head forward", "head backward"}
        # One replica reduces nothing during a text step, so no dummy image stands in for the encoders.
        images = row["modality"] == "multimodal"
        assert blocks == {0: both | encoders if images else both, 1: both | head}
        encoded = [box["args"]["micro_batch"] for box in rows[0] if box["cat"] == "encoders forward"]
        assert encoded == ([*range(MICRO_BATCHES)] if images else [])


def test_the_picture_has_a_row_per_rank(recorded: Path) -> None:
    root = ElementTree.parse(recorded / "timeline/step_000002.svg").getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "rank 0: encoders + 2 layers" in texts and "rank 1: 2 layers + head" in texts
    assert any("tensor 1 x pipeline 2 x data 1, layers 2+2" in text and "measured, step 2" in text for text in texts)


def test_virtual_stages(dataset: Path, tmp_path: Path) -> None:
    sizes = ("parallel.virtual_pipeline=2", "parallel.layout=[1,1,1,1]", "training.steps=2")
    done = run_training(dataset, tmp_path, *SIZES, *sizes, "run.timeline_steps=[2]", processes=2)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((tmp_path / "timeline").iterdir())] == ["step_000002.json", "step_000002.svg"]
    rows = read(tmp_path, 2)
    check_order(rows, virtual=2)
    for boxes in rows.values():
        check_times(boxes, step_s=metrics(tmp_path)[1]["step_time_s"])


def test_split_all_encodes_before_the_pipeline(dataset: Path, tmp_path: Path) -> None:
    sizes = ("parallel.vision=split_all", "parallel.layout=[2,2]", "training.steps=2", "data.multimodal_fraction=1.0")
    parts = "training.train=[llm,adaptor,siglip]"
    done = run_training(dataset, tmp_path, *SIZES, *sizes, parts, "run.timeline_steps=[2]", processes=2)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path, 2)
    check_order(rows, virtual=1)
    for boxes in rows.values():
        check_times(boxes, step_s=metrics(tmp_path)[1]["step_time_s"])
        outside = {box["cat"]: box for box in boxes if box["args"]["micro_batch"] is None}
        inside = [box for box in boxes if box["args"]["micro_batch"] is not None]
        assert end(outside["encoders forward"]) <= inside[0]["ts"]
        assert outside["encoders backward"]["ts"] >= end(inside[-1])


def read(run: Path, step: int) -> dict[int, list[dict[str, Any]]]:
    """Boxes of each row, sorted by start."""
    rows = defaultdict(list)
    for event in json.loads((run / f"timeline/step_{step:06d}.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            rows[event["tid"]].append(event)
    return {rank: sorted(boxes, key=lambda box: box["ts"]) for rank, boxes in rows.items()}


def check_order(rows: dict[int, list[dict[str, Any]]], *, virtual: int) -> None:
    """Boxes of each row form passes in megatron-core's order."""
    for rank, boxes in rows.items():
        steps = [
            Compute(box["cat"].endswith("backward"), box["args"]["micro_batch"], box["args"]["stage"])
            for box in boxes
            if box["args"]["micro_batch"] is not None
        ]
        found = tuple(step for step, _ in itertools.groupby(steps))
        assert found == passes(rank, pipeline=2, virtual=virtual, micro_batches=MICRO_BATCHES)


def check_times(boxes: list[dict[str, Any]], *, step_s: float) -> None:
    """Boxes do not overlap, fill most of the rank's time, and last as long as the step.

    Bounds are wide: the step is timed on rank 0, and a busy machine stops processes anywhere.
    """
    assert boxes[0]["ts"] >= 0
    assert all(end(a) <= b["ts"] + TINY * 1e6 for a, b in itertools.pairwise(boxes))
    whole = (end(boxes[-1]) - boxes[0]["ts"]) / 1e6
    assert 0.5 * whole <= sum(box["dur"] for box in boxes) / 1e6
    assert 0.5 * step_s <= whole <= 2 * step_s


def end(box: dict[str, Any]) -> float:
    return box["ts"] + box["dur"]
