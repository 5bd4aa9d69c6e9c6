"""The verification card says what commands did, and nothing that none of them did."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launch.bench import programs, verification
from launch.bench.verification import Cell, main


def says(text: str, *, code: int = 0, counted: Path | None = None) -> tuple[str, ...]:
    """A command that prints a text, ends with a code, and adds a line to a file."""
    count = f"open({str(counted)!r}, 'a').write('ran\\n'); " if counted else ""
    return ("python", "-c", f"{count}print({text!r}); raise SystemExit({code})")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results; two cells share one command, and most cannot run."""
    folder = tmp_path / "results"
    folder.mkdir()
    shared = says("stage1 loss 3 -> 2\nstage2   loss 2 -> 1\nresume bitwise | same", counted=tmp_path / "runs")
    cells = {
        model: {item: Cell(what="a step", missing=lambda: "needs GPUs") for item in verification.ITEMS}
        for model in verification.MODELS
    }
    cells["tiny"] |= {
        "init": Cell(what="start weights", command=says("= 3 passed, 1 skipped, 6 deselected, 1 warning in 0.50s =")),
        "three stages": Cell(what="training", command=shared, result="stage.*"),
        "resume": Cell(what="a kill", command=shared, result="resume.*"),
        "export": Cell(what="a crash", command=says("3 passed in 1s", code=1)),
        "clients": Cell(what="nothing said", command=says("4 skipped in 1s")),
        "GPU": Cell(what="CUDA", command=says("3 passed in 1s"), missing=lambda: "no GPU here"),
    }
    cells["7b"]["export"] = Cell(
        what="bytes", command=says(""), result="Every .*", missing=lambda: "no disk", report="c_*.md"
    )
    (folder / "c_1.md").write_text("# Title\nEvery byte came back.\n")
    monkeypatch.setattr(verification, "CELLS", cells)
    monkeypatch.setattr(verification, "RESULTS", folder)
    monkeypatch.setattr(verification, "commit_here", lambda: "c0ffee")
    return folder


def rows(folder: Path, *, title: str) -> dict[str, list[str]]:
    """Cells of a model's table by item."""
    (card,) = folder.glob("verification_*.md")
    part = card.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines[1:]}


def test_card_says_how_each_command_ended(results: Path) -> None:
    assert main([]) == 1
    tiny = rows(results, title=verification.MODELS["tiny"])
    assert {item: cells[1] for item, cells in tiny.items() if cells[1] != "not run"} == {
        "init": "verified",
        "three stages": "verified",
        "resume": "verified",
        "export": "failed",
        "clients": "failed",
    }
    assert tiny["init"][2] == "3 passed, 1 skipped" and tiny["init"][3].startswith("c0ffee, ")
    assert tiny["three stages"][2] == "stage1 loss 3 -> 2; stage2 loss 2 -> 1"
    assert tiny["export"][2] == "ended with 1: 3 passed" and tiny["clients"][2] == "ended with 0"
    assert tiny["GPU"][2] == "no GPU here" and tiny["layouts"][2] == "needs GPUs"


def test_versions_are_those_of_the_environment_used(results: Path, tmp_path: Path) -> None:
    other = tmp_path / "client/python"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho Python 3.10.1 or 1 passed\n")
    other.chmod(0o755)
    verification.CELLS["7b"]["clients"] = Cell(what="a client", command=("env", "A=b", str(other), "-m", "pytest"))
    main(["tiny/init", "tiny/resume", "7b/clients"])
    (card,) = results.glob("verification_*.md")
    here, there = (line for line in card.read_text().splitlines() if line.startswith(("Run on ", "On ")))
    assert f"Python {platform.python_version()}, torch " in here and here.startswith("Run on ")
    assert there.endswith("Python 3.10.1 or 1 passed: 7b/clients.")


def test_an_earlier_report_is_named(results: Path) -> None:
    assert main(["--write"]) == 0
    full = rows(results, title=verification.MODELS["7b"])
    assert full["export"][1:3] == ["reported", "Every byte came back. ([report](c_1.md))"]
    assert {cells[1] for item, cells in full.items() if item != "export"} == {"not run"}


def test_results_are_kept_and_failures_repeated(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = results.parent / "runs"
    main([])
    main([])
    assert counted.read_text().count("ran") == 1
    verification.CELLS["tiny"]["export"] = Cell(what="mended", command=says("9 passed in 1s"))
    assert main(["tiny/export", "tiny/resume"]) == 0
    assert counted.read_text().count("ran") == 2
    tiny = rows(results, title=verification.MODELS["tiny"])
    assert tiny["export"][:3] == ["mended", "verified", "9 passed"] and tiny["init"][1] == "verified"
    # At another commit everything is due again.
    monkeypatch.setattr(verification, "commit_here", lambda: "beef")
    main([])
    assert counted.read_text().count("ran") == 3
    (store,) = results.glob("verification_*.json")
    assert json.loads(store.read_text())["tiny/init"]["commit"] == "beef"


def test_a_record_of_another_command_is_dropped(results: Path) -> None:
    main(["tiny/init"])
    verification.CELLS["tiny"]["init"] = Cell(what="more", command=says("4 passed in 1s"))
    main(["--write"])
    assert rows(results, title=verification.MODELS["tiny"])["init"][1:3] == ["not run", "not run yet"]


def test_a_checkout_that_changes_meanwhile_verifies_nothing(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["c0ffee", "c0ffee", "beef"])
    monkeypatch.setattr(verification, "commit_here", lambda: next(commits))
    assert main(["tiny/init"]) == 1
    shown = rows(results, title=verification.MODELS["tiny"])["init"]
    assert shown[1] == "failed" and shown[3].startswith("c0ffee to beef, ")


@pytest.mark.parametrize("commit", ["c0ffee+changes", "unknown"])
def test_files_without_a_commit_are_due_again(results: Path, monkeypatch: pytest.MonkeyPatch, commit: str) -> None:
    monkeypatch.setattr(verification, "commit_here", lambda: commit)
    main([])
    main([])
    assert (results.parent / "runs").read_text().count("ran") == 2


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, in which git runs."""
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    monkeypatch.setattr(verification, "RESULTS", tmp_path / "launch/bench/results")
    (tmp_path / "launch/bench/results").mkdir(parents=True)
    (tmp_path / "launch/bench/results/c_1.md").write_text("Every byte came back.\nA sentense.\n")
    commit(tmp_path, "first", init=True)
    return tmp_path


def commit(folder: Path, message: str, *, init: bool = False) -> str:
    """Commit all files; the short hash."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    calls = [["add", "-A"], [*who, "commit", "-qm", message]]
    for words in [["init", "-q"], *calls] if init else calls:
        subprocess.run(["git", *words], cwd=folder, check=True)
    return programs.git("rev-parse", "--short=10", "HEAD")


def test_the_commit_of_changed_files_is_marked(repository: Path) -> None:
    head = programs.git("rev-parse", "--short=10", "HEAD")
    assert head and verification.commit_here() == head
    (repository / "launch/bench/results/c_1.md").write_text("written by a command")
    assert verification.commit_here() == head
    (repository / "code.py").touch()
    assert verification.commit_here() == f"{head}+changes"
    # What git cannot read is not clean.
    (repository / ".git/index").write_bytes(b"damaged")
    assert verification.commit_here() == f"{head}+changes"


def test_a_report_keeps_the_commit_of_its_result(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = programs.git("rev-parse", "--short", "HEAD")
    path = repository / "launch/bench/results/c_1.md"
    path.write_text(path.read_text().replace("sentense", "sentence"))
    commit(repository, "Mend a word")
    monkeypatch.setitem(verification.CELLS["7b"], "export", Cell(what="bytes", result="Every .*", report="c_*.md"))
    assert verification.earlier("7b/export")[1].startswith(f"{first}, ")


def test_a_timeout_ends_what_the_command_started(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = results.parent / "child"
    sleeper = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}], start_new_session=True)"
    monkeypatch.setattr(verification, "LIMIT_S", 10)
    verification.CELLS["tiny"]["init"] = Cell(what="a hang", command=("python", "-c", code))
    assert main(["tiny/init"]) == 1
    assert rows(results, title=verification.MODELS["tiny"])["init"][2] == "ended with 124"
    end = time.monotonic() + 600
    while psutil.pid_exists(int(note.read_text())):
        assert time.monotonic() < end, "the child of a child is still there"
        time.sleep(0.1)


def test_a_torch_without_cuda_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    verification.no_gpu.cache_clear()
    try:
        assert verification.no_gpu() == "torch sees no GPU here"
        assert not verification.wanted(["1b/GPU", "tiny/GPU"], {}, commit="c0ffee")
    finally:
        verification.no_gpu.cache_clear()


@pytest.mark.parametrize("model", ["1b", "7b"])
def test_a_gpu_cell_needs_a_measured_step_of_its_size(model: str) -> None:
    pattern = verification.cell(f"{model}/GPU").result
    measured = f"| {model} whole: MegaVL | text | 24 | 101.0 | 9,000 |"
    others = ["| tiny whole: MegaVL | text | 2 | 1.0 |", f"| {model} whole: MegaVL | text | failed, see below | | |"]
    said = "\n".join([*others, f"| {model} whole: transformers | text | 24 | 300.0 |", measured])
    assert verification.measured(said, pattern) == measured.strip("| ")
    assert verification.measured("\n".join(others), pattern) == ""


def test_an_unknown_cell_is_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tiny/exports"])
    assert ended.value.code == 2 and "tiny/exports: no such cell; choose from tiny, 1b" in capsys.readouterr().err


def test_every_cell_of_the_card_is_stated() -> None:
    assert {model: tuple(cells) for model, cells in verification.CELLS.items()} == dict.fromkeys(
        verification.MODELS, verification.ITEMS
    )
    for name in verification.names_of_cells():
        cell = verification.cell(name)
        assert cell.command or cell.missing(), f"{name} has neither a command nor a reason"
        for word in cell.command:
            path = verification.ROOT / word
            assert not word.startswith(("tests/", "launch/")) or path.exists(), f"{name}: {word} is not there"
