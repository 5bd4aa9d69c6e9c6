"""A run killed with SIGKILL, or asked to stop, goes on bitwise where it was; at another layout to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.noted_groups import check_groups_made_once, run_noted
from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, metrics, run_training, train_command
from tests.unit.evaluate.benchmarks import published

LAYOUT = ("parallel.tensor=2", "parallel.pipeline=1", "parallel.sequence_parallel=true", "parallel.layout=auto")
OTHER = (
    *("parallel.tensor=1", "parallel.pipeline=2", "parallel.sequence_parallel=false", "parallel.layout=[1,3]"),
    "parallel.vision=split_all",
)


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of the uninterrupted run."""
    run = tmp_path_factory.mktemp("reference")
    done = run_training(dataset, run, *LAYOUT, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {row["modality"] for row in rows} == {"text", "multimodal"}
    # Its only source has no name, so it is called by its number.
    assert all(row["loss_by_source"] == {"0": pytest.approx(row["loss"], rel=1e-6)} for row in rows)
    assert json.loads((run / "exit_status.json").read_text())["code"] == 0
    return rows


def test_killed_run_resumes_bitwise(
    dataset: Path, reference: list[dict[str, Any]], tmp_path: Path, report_table: Any
) -> None:
    """It evaluates every second step, as the reference does not, and no loss differs."""
    evaluating = evaluation_of(dataset, tmp_path)
    interrupt(dataset, tmp_path, signal.SIGKILL, *evaluating, after=5)
    done = run_noted(dataset, tmp_path, *LAYOUT, *evaluating, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step 3" in done.stdout
    check_groups_made_once(tmp_path, processes=2)
    columns = ("step", "modality", "loss", "loss_by_source", "grad_norm", "lr", "loss_tokens", "images")
    columns += ("consumed_samples",)
    assert [[row[key] for key in columns] for row in metrics(tmp_path)] == [
        [row[key] for key in columns] for row in reference
    ]
    again = metrics(tmp_path, "metrics.discarded.jsonl")
    assert [row["step"] for row in again][:2] == [4, 5]
    assert all(row["loss"] == reference[row["step"] - 1]["loss"] for row in again)
    rows = metrics(tmp_path, "evaluation.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    for row in rows:
        assert 0 <= row["tasks"]["few"]["accuracy"] <= 1 and row["tasks"]["few"]["n"] == 6
        assert row["tasks"]["mmbench"]["n"] == 4 and row["tasks"]["mmbench"]["chance"] == pytest.approx(0.375)
        assert {kind: part["sequences"] for kind, part in row["held_out"]["shards"].items()} == {
            "text": 3,
            "multimodal": 3,
        }
    (before,) = [row for row in metrics(tmp_path, "evaluation.discarded.jsonl") if row["step"] == 4]
    assert before["held_out"] == rows[2]["held_out"] and before["tasks"] == rows[2]["tasks"]
    first, last = (row["held_out"]["shards"]["text"] for row in (rows[0], rows[-1]))
    report_table(
        ["held-out text, bits per byte before and after 8 steps", first["bits_per_byte"], last["bits_per_byte"]]
    )
    assert last["loss"] < first["loss"] and last["bits_per_byte"] < first["bits_per_byte"]
    assert "evaluation after step 8: few: accuracy" in done.stdout


def evaluation_of(dataset: Path, folder: Path) -> tuple[str, ...]:
    """Settings of an evaluation on six questions and on the training data."""
    task, source = folder / "few.jsonl", dataset / "corpus/eval.jsonl"
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:6]]
    rows = [{**line, "images": [str(source.parent / image) for image in line["images"]]} for line in lines]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = (f"evaluation.held_out=[{dataset}/shards]", "evaluation.held_out_sequences=3")
    tasks = f"evaluation.tasks=[{task}, mmbench={published.mmbench(folder)}]"
    return (tasks, *held_out, "evaluation.interval=2", "evaluation.at_start=true")


def test_signal_saves_and_another_layout_goes_on(
    dataset: Path, reference: list[dict[str, Any]], tmp_path: Path, report_table: Any
) -> None:
    interrupt(dataset, tmp_path, signal.SIGTERM, after=4)
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert (status["code"], status["resumable"]) == (75, True), status
    stopped = metrics(tmp_path)[-1]["step"]
    assert 4 <= stopped < 8
    done = run_training(dataset, tmp_path, *OTHER, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {stopped}" in done.stdout
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    error = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, reference, strict=True))
    report_table(
        f"loss after resuming tp2+sp as pp2 with split_all: largest relative difference {error:.1e} (tolerance 1e-5)"
    )
    assert error <= 1e-5


def test_lost_rank_ends_the_run_with_code_7(dataset: Path, tmp_path: Path) -> None:
    command = train_command(dataset, tmp_path, *LAYOUT, processes=2)
    process = subprocess.Popen(
        command, cwd=ROOT, env=forked(environment()), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(process, tmp_path, 2)
    workers = [c for c in psutil.Process(process.pid).children() if "RANK" in c.environ()]
    next(worker for worker in workers if worker.environ()["RANK"] == "1").kill()
    killed = time.monotonic()
    printed = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode != 0 and time.monotonic() - killed < 300, "long before the timeout of 600 s"
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert (status["code"], status["rank"], status["resumable"]) == (7, 0, True), status
    assert "lost a peer at step" in status["reason"] and "Traceback" not in printed.partition("error: ")[0], printed


@pytest.mark.slow
def test_stopped_rank_ends_the_run_with_code_7(dataset: Path, tmp_path: Path) -> None:
    command = train_command(dataset, tmp_path, *LAYOUT, "parallel.timeout_s=10", processes=2)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(process, tmp_path, 2)
    workers = [c for c in psutil.Process(process.pid).children() if "RANK" in c.environ()]
    next(worker for worker in workers if worker.environ()["RANK"] == "1").suspend()
    stopped = time.monotonic()
    while not (tmp_path / "exit_status.json").exists():
        assert time.monotonic() - stopped < PATIENCE_S, "the other rank does not end"
        time.sleep(0.1)
    process.communicate(timeout=PATIENCE_S)
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert (status["code"], status["rank"], status["resumable"]) == (7, 0, True), status


@pytest.mark.slow
def test_image_workers_may_be_signalled_killed_and_stopped(
    dataset: Path, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    # One image ahead keeps the worker busy until the last step; a silent one is replaced after a third of the timeout.
    changes = ("data.num_workers=1", "data.prefetch_images=1", "parallel.timeout_s=30")
    command = train_command(dataset, tmp_path, *LAYOUT, *changes, processes=2)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(process, tmp_path, 1)
    first = image_worker(process.pid)
    first.send_signal(signal.SIGTERM)
    wait_for_steps(process, tmp_path, 2)
    assert image_worker(process.pid) == first
    first.kill()
    wait_for_steps(process, tmp_path, 4)
    image_worker(process.pid).suspend()
    printed = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, printed
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in reference]
    assert all(row["bad_samples"] == 0 for row in metrics(tmp_path))
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").glob("iter_*")) == ["6", "8"]
    assert f"image worker {first.pid} was killed by SIGKILL" in printed and "gave no answer for 10 s" in printed


def image_worker(launcher: int) -> psutil.Process:
    """The only process that decodes images; waits for it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for child in psutil.Process(launcher).children(recursive=True):
            if "megavl.data.image_worker" in child.cmdline():
                return child
        time.sleep(0.02)
    raise AssertionError("no image worker runs")


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    """Until that many steps are logged."""
    deadline = time.monotonic() + PATIENCE_S
    while len(metrics(run)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def interrupt(dataset: Path, run: Path, number: signal.Signals, *overrides: str, after: int) -> None:
    """Train until `after` steps are logged, then signal every process (SIGKILL) or the launcher (others)."""
    command = train_command(dataset, run, *LAYOUT, *overrides, processes=2)
    process = subprocess.Popen(
        command, cwd=ROOT, env=forked(environment()), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(process, run, after)
    victims = [process.pid]
    if number == signal.SIGKILL:
        victims += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for pid in victims:
        os.kill(pid, number)
    process.communicate(timeout=PATIENCE_S)
