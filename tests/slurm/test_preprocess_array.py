"""A real SLURM array over two nodes makes the same dataset as one process."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.corpus_files import arguments, make_corpus, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TASKS = 4

pytestmark = pytest.mark.slurm


def run(command: list[str], *, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "data_tools/preprocess.py", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def content(out: Path) -> dict[str, bytes]:
    files = [file for file in out.rglob("*") if file.is_file() and "lock" not in file.name]
    return {str(file.relative_to(out)): file.read_bytes() for file in files if "slurm" not in file.parts}


def submit(cluster: Any, command: list[str]) -> list[str]:
    """Job numbers of the array and of the merging job."""
    # One array task per node at a time, so that both nodes take part.
    more = ["--engine", "slurm", "--num-tasks", str(TASKS), "--sbatch", "--exclusive --mem=100"]
    shown = run([*command, *more], environment=cluster.environment)
    return re.findall(r"job (?:array )?(\d+)", shown)


def test_array_on_two_nodes_gives_the_same_bytes(cluster: Any, tmp_path: Path, report_table: Any) -> None:
    inputs = make_corpus(tmp_path / "in", images=150, texts=150, note="x" * 5000)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    run(arguments(inputs, tokenizer=tokenizer, output=tmp_path / "local"))
    started = time.monotonic()
    # A space: SLURM reads the paths in the scripts' own lines as a shell does.
    out = tmp_path / "the output"
    array, merge = submit(cluster, arguments(inputs, tokenizer=tokenizer, output=out))
    fields = cluster.wait_for(merge, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", seconds=1800)
    seconds = time.monotonic() - started
    logs = {path.name: path.read_text() for path in out.glob("slurm/*/*/slurm_logs/*")}
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), logs
    assert set(logs) == {*(f"{array}_{task}.out" for task in range(TASKS)), f"{merge}_0.out"}
    shown = cluster.run("scontrol", "--oneliner", "show", "job", array)
    assert set(re.findall(r" NodeList=(\S+)", shown)) == {"vnode1", "vnode2"}
    tasks = len(list((out / "units").glob("[0-9]*[0-9].json")))
    assert f"{tasks} of {tasks} shards are done already" in logs[f"{merge}_0.out"] and tasks > 2 * TASKS
    assert content(out) == content(tmp_path / "local")
    report_table(f"{TASKS} tasks on 2 nodes: {tasks} shards in {seconds:.1f} s with the merge, equal to one process's")


def test_failed_task_leaves_no_dataset_or_job(cluster: Any, tmp_path: Path) -> None:
    inputs = make_corpus(tmp_path / "in", images=2, texts=4)
    (tmp_path / "in/text.jsonl").write_text('{"text": ""}\n{"text": "red"}\n', encoding="utf-8")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    more = ["--on-error", "fail"]
    array, merge = submit(cluster, arguments(inputs, tokenizer=tokenizer, output=tmp_path / "out", more=more))
    fields = cluster.wait_for(merge, "COMPLETED", "FAILED", "CANCELLED", seconds=1800)
    assert fields["JobState"] == "CANCELLED"
    assert not (tmp_path / "out/manifest.json").exists()
    logs = "".join(path.read_text() for path in (tmp_path / "out").glob(f"slurm/*/*/slurm_logs/{array}_*.out"))
    assert "text.jsonl:1: empty_text" in logs and "Traceback" not in logs
