"""A run directory that fills, becomes read-only or is odd costs warnings and rows, never the training."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.test_refusals import refuse
from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, metrics, train_command
from tests.tmpfs import mounted

ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false", "parallel.layout=auto")


def is_file(path: Path) -> None:
    path.write_text("")


def is_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("spoil", [is_file, is_dangling])
def test_odd_run_directory_ends_with_code_5(dataset: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "run")
    code, message = refuse(dataset, tmp_path / "run")
    assert code == 5 and f"run.dir: cannot write to {tmp_path}/run" in message, message


def test_checkpoint_directory_is_checked_before_the_data(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, message = refuse(
        dataset, tmp_path / "run", f"checkpoint.dir={tmp_path}/file/below", f"data.sources=[{{path: {tmp_path}}}]"
    )
    assert code == 5 and f"checkpoint.dir: cannot write to {tmp_path}/file/below" in message, message
    assert json.loads((tmp_path / "run/exit_status.json").read_text())["code"] == 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["exit_status.json"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    with mounted(tmp_path / "disk", options="size=1m") as folder:
        yield folder


def remount(disk: Path, mode: str) -> None:
    """Make the disk read-only or not, between two writes to it."""
    deadline = time.monotonic() + PATIENCE_S
    while subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], capture_output=True).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_read_only_and_full_disk_cost_rows_but_no_training(dataset: Path, tmp_path: Path, disk: Path) -> None:
    run, env = disk / "run", forked(environment())
    changes = ("training.steps=24", "checkpoint.interval=100", "data.multimodal_fraction=0.0", "run.tensorboard=true")
    command = train_command(dataset, run, *ALONE, *changes, f"checkpoint.dir={tmp_path}/kept", processes=1)
    process = subprocess.Popen(
        [env["PYTHON_EXEC"], "-u", "-m", *command[command.index("megavl") :]],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed = []

    def read_until(text: str) -> None:
        for line in process.stdout:  # type: ignore[union-attr]
            printed.append(line)
            if text in line:
                return
        raise AssertionError("".join(printed))

    read_until("step  1/24")
    remount(disk, "ro")
    read_until("metrics.jsonl cannot be written (Read-only file system)")
    remount(disk, "rw")
    read_until("metrics.jsonl can be written again; records lost so far:")
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    printed.append(process.communicate(timeout=PATIENCE_S)[0])
    said = "".join(printed)
    assert "Traceback" not in said and process.returncode == 5, said
    assert said.count("metrics.jsonl cannot be written") == 2, said
    assert "step 24/24" in said and (tmp_path / "kept/iter_0000024/manifest.json").exists()
    assert "exit_status.json cannot be written (No space left on device)" in said and '"code": 5' in said
    steps = [row["step"] for row in metrics(run)]
    assert steps == sorted(set(steps)) and 1 in steps and 24 not in steps


def test_full_disk_behind_standard_output_does_not_end_a_run(dataset: Path, tmp_path: Path) -> None:
    env = forked(environment())
    command = train_command(dataset, tmp_path / "run", *ALONE, "training.steps=2", processes=1)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [env["PYTHON_EXEC"], "-u", "-m", *command[command.index("megavl") :]],
            cwd=ROOT,
            env=env,
            stdout=full,
            stderr=full,
            timeout=PATIENCE_S,
            check=False,
        )
    assert done.returncode == 0 and [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert not os.path.exists(tmp_path / "run/owner-1.json")
