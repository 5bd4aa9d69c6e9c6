"""`launch.sh` with real torchrun on this machine: a stopped rank, Ctrl-C, and a save that takes long."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.two_ranks import BOUND_S, saved
from tests.tiny_run import PATIENCE_S, ROOT, SEQ_LENGTH, environment, forked, metrics

TIMEOUT_S = 30


def launch(
    dataset: Path, run: Path, *, variables: dict[str, str], timeout_s: int = 600, **settings: str
) -> subprocess.Popen[str]:
    """`launch/pretrain_7b.sh` with the tiny recipe on two ranks."""
    extra = [
        *(f"data.seq_length={SEQ_LENGTH}", "run.tensorboard=false", "checkpoint.init=null", "parallel.layout=auto"),
        *("checkpoint.allow_random_init=true", "training.steps=200", "training.global_batch_size=2"),
        *("optimizer.warmup_steps=2", "checkpoint.interval=100", f"parallel.timeout_s={timeout_s}"),
    ]
    chosen = {
        "RECIPE": "launch/recipes/tiny/stage2.yaml",
        "TP": "2",
        "PP": "1",
        "GPUS_PER_NODE": "2",
        "RUN_DIR": str(run),
        "EXTRA": " ".join(extra),
        "DATA": f"{dataset}/shards",
        "TOKENIZER": f"{dataset}/corpus/tokenizer",
        **settings,
    }
    return subprocess.Popen(
        ["bash", "launch/pretrain_7b.sh"],
        cwd=ROOT,
        env={**variables, **chosen},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_ctrl_c,
    )


def hear_ctrl_c() -> None:
    """Tests in the background ignore SIGINT, and a shell cannot trap what it ignores from its start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while len(metrics(run)) < steps:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "exit_status.json").read_text())
    return found


def ranks_of(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}


@pytest.mark.slow
def test_a_stopped_rank_does_not_hold_the_launcher(dataset: Path, tmp_path: Path, report_table: Any) -> None:
    process = launch(dataset, tmp_path, variables=environment(), timeout_s=TIMEOUT_S, PYTHON=sys.executable)
    wait_for_steps(process, tmp_path, 2)
    stopped = ranks_of(process)["1"]
    stopped.suspend()
    began = time.monotonic()
    printed = process.communicate(timeout=PATIENCE_S)[0]
    seconds = time.monotonic() - began
    report_table(f"launch.sh ended {seconds:.1f} s after SIGSTOP of a rank; promised: {TIMEOUT_S + 20} s")
    assert process.returncode == 7 and seconds < BOUND_S, printed
    assert (status(tmp_path)["code"], status(tmp_path)["rank"]) == (7, 0)
    assert not stopped.is_running()


def test_ctrl_c_saves_and_ends_with_130(dataset: Path, tmp_path: Path) -> None:
    variables = forked(environment())
    process = launch(dataset, tmp_path, variables=variables, PYTHON=variables["PYTHON_EXEC"])
    wait_for_steps(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 130, printed
    found = status(tmp_path)
    assert (found["code"], found["resumable"]) == (130, True) and saved(tmp_path) == [found["step"]]
    assert printed.count("stopped by Ctrl-C after step") == 1 and "error: " not in printed, printed


@pytest.mark.slow
def test_a_save_of_45_seconds_outlives_torchruns_patience(dataset: Path, tmp_path: Path, report_table: Any) -> None:
    faults = ",".join(f"after_shard:0:{step}:slow" for step in range(1, 100))
    variables = {**forked(environment()), "FAULT": faults}
    process = launch(dataset, tmp_path, variables=variables, PYTHON=variables["PYTHON_EXEC"])
    wait_for_steps(process, tmp_path, 2)
    began = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    # A scheduler may send another one meanwhile.
    time.sleep(20)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=PATIENCE_S)[0]
    report_table(f"saved and ended {time.monotonic() - began:.1f} s after USR1")
    assert process.returncode == 75, printed
    assert saved(tmp_path) == [status(tmp_path)["step"]] and time.monotonic() - began > 45
