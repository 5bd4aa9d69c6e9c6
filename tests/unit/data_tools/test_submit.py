"""Submission of a job array, with a stand-in for sbatch that notes what it was told."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.preprocess import main
from tests.unit.data.corpus_files import arguments, make_corpus, make_tokenizer, run_preprocess

STAND_IN = f"""#!{sys.executable}
import json, sys
with open({{log!r}}, "a+") as stream:
    stream.seek(0)
    number = 40 + len(stream.readlines())
    stream.write(json.dumps(sys.argv[1:]) + "\\n")
if number >= {{limit}}:
    sys.exit("sbatch: error: Batch job submission failed: Invalid job array specification")
print(f"{{{{number}}}};cluster")
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[list[str]]]]:
    """Installs the stand-in; what it returns reads the calls."""

    def install(*, limit: int = 99) -> Callable[[], list[list[str]]]:
        folder, log = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir()
        (folder / "sbatch").write_text(STAND_IN.format(log=str(log), limit=limit))
        (folder / "sbatch").chmod(0o755)
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


def test_the_queued_commands_make_the_dataset(
    sbatch: Callable[..., Callable[[], list[list[str]]]],
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = sbatch()
    assert main([*command, "--num-tasks", "2", "--sbatch", "--partition=cpu --comment='two words'"]) == 0
    assert "submitted job array 40 of 2 tasks, and job 41, which makes the dataset" in capsys.readouterr().out
    array, merge = calls()
    assert {"--array=0-1", "--cpus-per-task=1", "--partition=cpu", "--comment=two words", "--requeue"} <= set(array)
    assert {"--dependency=afterok:40", "--kill-on-invalid-dep=yes", "--partition=cpu"} <= set(merge)
    for call in (array, merge):
        assert call[call.index("--chdir") + 1] == str(Path.cwd())
    out = tmp_path / "out dir"
    for task, call in (("1", array), ("0", array), ("", merge)):
        assert not (out / "manifest.json").exists()
        line = call[call.index("--wrap") + 1]
        done = subprocess.run(
            ["sh", "-c", line],
            env={"SLURM_ARRAY_TASK_ID": task, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("owned"))
    local = tmp_path / "local"
    parts = list(command)
    parts[parts.index("slurm")] = "local"
    parts[parts.index("--output") + 1] = str(local)
    assert main(parts) == 0
    for name in ("manifest.json", "packs.npy", "report.json", "rejects.jsonl"):
        assert (local / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("limit", "more", "message"),
    [
        (40, ["--num-tasks", "5000"], "sbatch refused .*Invalid job array specification.*--num-tasks"),
        (41, ["--num-tasks", "2"], "job 40 was queued already, and the same command merges its shards"),
        (99, [], "needs --num-tasks of 2 or more"),
        (99, ["--num-tasks", "2", "--dry-run"], "needs --num-tasks"),
        (99, ["--num-tasks", "2", "--sbatch", "'open"], "--sbatch 'open: No closing quotation"),
    ],
)
def test_mistakes_are_one_message(
    sbatch: Callable[..., Callable[[], list[list[str]]]],
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    limit: int,
    more: list[str],
    message: str,
) -> None:
    sbatch(limit=limit)
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_without_slurm(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*command, "--num-tasks", "2"]) == 2
    assert "cannot start sbatch" in capsys.readouterr().err


def test_nothing_is_queued_for_an_output_of_other_settings(
    sbatch: Callable[..., Callable[[], list[list[str]]]], tmp_path: Path, command: list[str]
) -> None:
    calls = sbatch()
    inputs = make_corpus(tmp_path / "other", images=2, texts=3)
    out = tmp_path / "out dir"
    assert run_preprocess(inputs, tokenizer=tmp_path / "tokenizer", output=out) == 0
    assert main([*command, "--num-tasks", "2"]) == 2
    assert calls() == []
