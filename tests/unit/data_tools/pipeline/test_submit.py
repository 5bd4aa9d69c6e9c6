"""Submission of a job array to a fake sbatch, which records its calls."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.preprocess import main
from tests.unit.data.corpus_files import arguments, make_corpus, make_tokenizer, run_preprocess

SBATCH = f"""#!{sys.executable}
import json, shlex, sys
from pathlib import Path
log = Path({{log!r}})
number = 40 + (len(log.read_text().splitlines()) if log.exists() else 0)
script = Path(sys.argv[-1]).read_text()
parts = [part for line in script.splitlines() if line.startswith("#SBATCH ") for part in shlex.split(line[8:])]
with log.open("a") as stream:
    stream.write(json.dumps({{{{"options": sys.argv[1:-1] + parts, "script": script}}}}) + "\\n")
if number >= {{limit}}:
    sys.exit("sbatch: error: Batch job submission failed: Invalid job array specification")
print(f"Submitted batch job {{{{number}}}} on cluster one")
"""
SCONTROL = "#!/bin/sh\necho node1\n"


Calls = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Installs the fake sbatch and returns a function that reads its calls."""

    def install(*, limit: int = 99) -> Calls:
        folder, log = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir()
        for name, content in (("sbatch", SBATCH.format(log=str(log), limit=limit)), ("scontrol", SCONTROL)):
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return install


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    root = tmp_path / "a folder; $(touch owned)"
    root.mkdir()
    inputs = make_corpus(root, images=4, texts=6)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    return arguments(inputs, tokenizer=tokenizer, output=tmp_path / "out dir", more=["--engine", "slurm"])


def in_job(call: dict[str, Any], *, index: int) -> "subprocess.CompletedProcess[str]":
    """Run the script of a job as SLURM would."""
    job = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "node1", "RUN_OFFSET": "0"}
    return subprocess.run(
        ["bash", "-c", call["script"]], env={**os.environ, **job}, capture_output=True, text=True, check=False
    )


def as_local(command: list[str], *, output: Path) -> list[str]:
    parts = list(command)
    parts[parts.index("slurm")] = "local"
    parts[parts.index("--output") + 1] = str(output)
    return parts


def test_queued_scripts_make_the_dataset(
    sbatch: Callable[..., Calls], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = sbatch()
    more = ["--num-tasks", "2", "--sbatch", "--partition=cpu --comment='two words'"]
    assert main([*command, *more]) == 0
    assert "submitted job array 40 of 2 tasks, and job 41, which makes the dataset" in capsys.readouterr().out
    array, merge = calls()
    assert {"--array=0-1", "--cpus-per-task=1", "--partition=cpu", "--comment=two words", "--requeue"} <= {
        *array["options"]
    }
    assert {"--dependency=afterok:40", "--kill-on-invalid-dep=yes", "--partition=cpu"} <= set(merge["options"])
    out = tmp_path / "out dir"
    for call in (array, merge):
        assert f"--chdir={Path.cwd()}" in call["options"]
        assert any(option.startswith(f"--output={out}/slurm/") for option in call["options"])
        assert not [option for option in call["options"] if option.startswith(("--time", "--mem"))]
    assert not list(out.rglob("*.pik")), "nobody is to load it"
    for index, call in ((1, array), (0, array), (0, merge)):
        assert not (out / "manifest.json").exists()
        done = in_job(call, index=index)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted(out.glob("slurm/*/shards/completions/*"))] == ["00000", "00001"]
    assert not list(tmp_path.rglob("owned"))
    assert main(as_local(command, output=tmp_path / "local")) == 0
    for name in ("manifest.json", "packs.npy", "report.json", "rejects.jsonl"):
        assert (tmp_path / "local" / name).read_bytes() == (out / name).read_bytes()


def test_only_unfinished_array_tasks_are_queued_again(
    sbatch: Callable[..., Calls], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = sbatch()
    assert main([*command, "--num-tasks", "3"]) == 0
    first, _ = calls()
    assert in_job(first, index=0).returncode == in_job(first, index=2).returncode == 0
    assert main([*command, "--num-tasks", "3"]) == 0
    again, merge = calls()[2:]
    assert "--array=0-0" in again["options"] and "--dependency=afterok:42" in merge["options"]
    assert in_job(again, index=0).returncode == 0, "this is task 1"
    capsys.readouterr()
    assert main([*command, "--num-tasks", "3"]) == 0
    assert "submitted no task, all shards being there, but job 44" in capsys.readouterr().out
    (last,) = calls()[4:]
    assert not [option for option in last["options"] if option.startswith("--dependency")]
    assert in_job(last, index=0).returncode == 0
    assert (tmp_path / "out dir/manifest.json").exists()


def test_failed_array_task_gives_one_message(sbatch: Callable[..., Calls], command: list[str]) -> None:
    calls = sbatch()
    text = Path(command[command.index("--input") + 1])
    text.write_text('{"text": ""}\n{"text": "red"}\n', encoding="utf-8")
    assert main([*command, "--num-tasks", "2", "--on-error", "fail"]) == 0
    done = in_job(calls()[0], index=0)
    assert done.returncode == 3
    assert "text.jsonl:1: empty_text" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("limit", "more", "message"),
    [
        (40, ["--num-tasks", "5000"], "Invalid job array specification\n.*sbatch refused.*reason above.*--num-tasks"),
        (41, ["--num-tasks", "2"], "job 40 was queued already, and the same command merges its shards"),
        (99, [], "needs --num-tasks of 2 or more"),
        (99, ["--num-tasks", "2", "--dry-run"], "needs --num-tasks"),
        (99, ["--num-tasks", "2", "--sbatch", "'open"], "--sbatch 'open: No closing quotation"),
    ],
)
def test_mistakes_are_one_message(
    sbatch: Callable[..., Calls],
    command: list[str],
    capfd: pytest.CaptureFixture[str],
    limit: int,
    more: list[str],
    message: str,
) -> None:
    sbatch(limit=limit)
    assert main([*command, *more]) == 2
    error = capfd.readouterr().err
    own = error.splitlines()[-1]
    # What sbatch itself says comes first.
    assert own.startswith("error: ") and error.count("\n") == 1 + error.count("sbatch: error:")
    assert re.search(message, error), error


def test_missing_sbatch_is_named(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*command, "--num-tasks", "2"]) == 2
    assert "cannot start sbatch" in capsys.readouterr().err


def test_nothing_is_queued_for_other_settings(sbatch: Callable[..., Calls], tmp_path: Path, command: list[str]) -> None:
    calls = sbatch()
    inputs = make_corpus(tmp_path / "other", images=2, texts=3)
    out = tmp_path / "out dir"
    assert run_preprocess(inputs, tokenizer=tmp_path / "tokenizer", output=out) == 0
    assert main([*command, "--num-tasks", "2"]) == 2
    assert calls() == []
