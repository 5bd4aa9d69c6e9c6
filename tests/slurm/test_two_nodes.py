"""A stage over two nodes x two ranks of a real SLURM: submitted, trained, pre-empted, resumed, cancelled."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, cluster: Any) -> Path:
    """A few captions and paragraphs, preprocessed for the tiny model."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "source"
    build = ["build_corpus.py", "demo", "--output", source, "--samples", "40", "--heldout", "4", "--size", "60000"]
    pack = ["preprocess.py", "--input", source / "captions.jsonl", source / "text.jsonl", "--output", folder / "shards"]
    pack += ["--tokenizer", source / "tokenizer", "--image-preset", "tiny-hybrid", "--seq-length", "256"]
    for script, *arguments in (build, pack):
        command = [sys.executable, f"data_tools/{script}", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


def submit(cluster: Any, corpus: Path, run_dir: Path, *overrides: str, **settings: str) -> str:
    """Start the stage by its launch script; returns the job's number."""
    extra = [
        f"training.steps={STEPS}",
        "training.global_batch_size=2",
        "data.seq_length=256",
        "checkpoint.interval=1000",
        "checkpoint.allow_random_init=true",
        "checkpoint.init=null",
        "optimizer.warmup_steps=2",
        "run.tensorboard=false",
        *overrides,
    ]
    chosen = {
        "RECIPE": "launch/recipes/tiny/stage2.yaml",
        "NODES": "2",
        "GPUS_PER_NODE": "2",
        "DATA": str(corpus / "shards"),
        "TOKENIZER": str(corpus / "source" / "tokenizer"),
        "RUN_DIR": str(run_dir),
        "PYTHON": sys.executable,
        "EXTRA": " ".join(extra),
        **settings,
    }
    return cluster.run("bash", str(ROOT / "launch" / "pretrain_7b.sh"), **chosen).split()[-1]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of the run's metrics."""
    log = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def output(run_dir: Path) -> str:
    """What the job printed."""
    return "\n".join(path.read_text() for path in run_dir.glob("slurm-*.out"))


def test_trains_over_two_nodes(cluster: Any, corpus: Path, tmp_path: Path, report_table: Any) -> None:
    job = submit(cluster, corpus, tmp_path / "run")
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), output(tmp_path / "run")
    assert fields["NumNodes"] == "2"
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "run" / "exit_status.json").read_text())["code"] == 0
    report_table(f"2 nodes x 2 ranks, TP 2 x PP 2: {STEPS} steps in {fields['RunTime']} of job time")


def wait_for_steps(cluster: Any, job: str, run_dir: Path, *, seconds: float = 1800) -> None:
    """Return once the run has logged a step."""
    end = time.monotonic() + seconds
    while not rows(run_dir):
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING") and time.monotonic() < end, output(run_dir)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--signal=USR1",), ("--batch", "--signal=USR1")], ids=["tasks", "batch-shell"])
def test_pre_emption_saves_requeues_and_resumes(
    cluster: Any, corpus: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, corpus, run_dir, "training.steps=120")
    wait_for_steps(cluster, job, run_dir)
    cluster.run("scancel", *how, job)
    cluster.wait_for(job, "PENDING")
    saved = json.loads((run_dir / "exit_status.json").read_text())
    assert (saved["code"], saved["resumable"]) == (75, True)
    assert 0 < saved["step"] < 120
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output(run_dir)
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 121))


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Any, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, corpus, run_dir, "training.steps=10000")
    wait_for_steps(cluster, job, run_dir)
    cluster.run("scancel", job)
    fields = cluster.wait_for(job, "CANCELLED", "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), output(run_dir)


@pytest.mark.slow
def test_requeues_of_a_killed_rank_are_bounded(cluster: Any, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, corpus, run_dir, "training.steps=10000", MAX_RESTARTS="1")
    for restarts in ("0", "1"):
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        wait_for_steps(cluster, job, run_dir)
        assert cluster.job(job)["Restarts"] == restarts
        cluster.run("scancel", "--signal=KILL", f"{job}.0")
        fields = cluster.wait_for(job, "PENDING", "FAILED")
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "1:0"), output(run_dir)
    assert "giving up" in output(run_dir)
