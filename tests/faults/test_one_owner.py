"""A second start touches nothing of the run that owns a directory; a dead owner's directory is free at once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, metrics, train_command

ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false", "parallel.layout=auto")
TWO = ("parallel.tensor=2", "parallel.pipeline=1", "parallel.sequence_parallel=true", "parallel.layout=auto")
MEASURED = ("step_time_s", "tokens_per_s", "mfu", "slowest_rank", "slowest_rank_s")


def start(dataset: Path, run: Path, *overrides: str, processes: int = 0) -> subprocess.Popen[str]:
    """A run under torchrun, or of one process without a launcher."""
    env = forked(environment())
    command = train_command(dataset, run, *overrides, processes=processes or 1, python=env["PYTHON_EXEC"])
    if not processes:
        command = [env["PYTHON_EXEC"], "-m", *command[command.index("megavl") :]]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed = process.communicate(timeout=PATIENCE_S)[0]
    return process.returncode, printed


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def results(run: Path) -> dict[str, Any]:
    """Content of every file of a run; of metrics what was not measured with a clock."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    files.pop("metrics.jsonl")
    rows = [{key: value for key, value in row.items() if key not in MEASURED} for row in metrics(run)]
    return {**files, "rows": json.dumps([{k: v for k, v in row.items() if "memory" not in k} for row in rows])}


def undisturbed(dataset: Path, run: Path, *overrides: str, processes: int = 0) -> dict[str, Any]:
    """Results of a run in this directory, which is moved away."""
    code, printed = finish(start(dataset, run, *overrides, processes=processes))
    assert code == 0, printed
    found = results(run)
    run.rename(run.with_name("undisturbed"))
    return found


def test_second_start_is_refused_and_touches_nothing(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    expected = undisturbed(dataset, run, *ALONE)
    first = start(dataset, run, *ALONE)
    wait_for(first, run / "owner-1.json")
    owner = json.loads((run / "owner-1.json").read_bytes())
    # Twice in the first run's directory, while it starts and later; then only its checkpoints would be shared.
    for changes, name in (([], "run.dir"), ([], "run.dir"), ([f"run.dir={tmp_path}/other"], "checkpoint.dir")):
        code, printed = finish(start(dataset, run, *ALONE, f"checkpoint.dir={run}/checkpoints", *changes))
        assert code == 2 and f"error: {name}: {run}" in printed and "Traceback" not in printed, printed
        assert f"host {owner['host']}, pid {owner['pid']}, since {owner['since']}" in printed
        assert first.poll() is None and not (run / "exit_status.json").exists()
        wait_for(first, run / "metrics.jsonl")
    code, printed = finish(first)
    assert code == 0, printed
    assert results(run) == expected
    assert not list(tmp_path.rglob("owner-*"))


def test_refused_recipe_leaves_the_status_of_a_run_alone(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "exit_status.json").write_text("{}")
    from megavl.files.owner import Owner
    from megavl.files.ownership import take

    with take(run, Owner.this_process(), name="run.dir"):
        code, printed = finish(start(dataset, run, *ALONE, "training.stepz=3", processes=1))
        assert code != 0 and "training.stepz" in printed
        assert (run / "exit_status.json").read_text() == "{}"


def test_orphans_of_a_killed_launcher_leave_for_the_next_run(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The fork server would be the parent of the ranks: real interpreters.
    command = train_command(dataset, run, *ALONE, "training.steps=200", processes=1)
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE_S
    while len(metrics(run)) < 2:
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[0]
        time.sleep(0.02)
    rank = json.loads((run / "owner-1.json").read_bytes())["pid"]
    launcher.kill()
    launcher.wait()
    os.kill(rank, 0)
    code, printed = finish(start(dataset, run, *ALONE))
    # Whether it had to wait for them depends on how long its own start took.
    assert code == 0, printed
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)
    assert json.loads((run / "exit_status.json").read_text())["code"] == 0


@pytest.mark.slow
def test_ten_second_starts_at_random_moments(dataset: Path, tmp_path: Path, report_table: Any) -> None:
    run = tmp_path / "run"
    expected = undisturbed(dataset, run, *TWO, processes=2)
    chance = random.Random(int(os.environ.get("SEED", "19")))
    for _ in range(10):
        first = start(dataset, run, *TWO, processes=2)
        wait_for(first, run / "owner-1.json")
        offset = chance.uniform(0.0, 8.0)
        time.sleep(offset)
        code, printed = finish(start(dataset, run, *TWO, processes=2))
        step = len(metrics(run))
        refused = "is in use by another process" in printed
        assert code != 0 and refused and "exitcode: 2" in printed.replace("  ", " "), printed
        assert first.poll() is None or step == 8
        code, printed = finish(first)
        assert code == 0, printed
        same = results(run) == expected
        report_table((f"second start {offset:4.1f} s after the first", f"step {step} of 8", f"bitwise equal: {same}"))
        assert same
        run.rename(tmp_path / f"run-{step}-{offset}")
