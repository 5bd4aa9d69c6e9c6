"""metrics.jsonl after a resume; exit_status.json holds the first cause."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavl.config.load import load_recipe
from megavl.files.owner import Owner
from megavl.files.ownership import take
from megavl.main.cli import main
from megavl.train.loop import _prepare_run_dir
from megavl.train.metrics import MetricsLog
from megavl.train.supervise.exit_status import ExitStatus

ROW = {
    "step": 0,
    "modality": "text",
    "loss": 1.5,
    "grad_norm": 0.1,
    "lr": 1e-3,
    "images": 0,
    "step_time_s": 0.5,
    "tokens_per_s": 100.0,
    "loss_tokens": 10,
    "mfu": None,
    "skipped": False,
}


def test_refused_recipe_tells_the_launcher_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun turns every code into 1, and the status of the run that owns the directory stays alone."""
    copy, recipe = tmp_path / "copy.json", tmp_path / "recipe.yaml"
    monkeypatch.setenv("MEGAVL_EXIT_STATUS", str(copy))
    monkeypatch.setenv("RANK", "0")
    for content, owned in ((f"run: {{dir: {tmp_path}/run}}", True), ("run: [", False)):
        recipe.write_text(content)
        copy.unlink(missing_ok=True)
        with take(tmp_path / "run", Owner.this_process(), name="run.dir") if owned else contextlib.nullcontext():
            assert main(["train", str(recipe)]) == 2
        assert json.loads(copy.read_text())["code"] == 2 and not (tmp_path / "run" / "exit_status.json").exists()


def test_resume_keeps_one_row_per_step(tmp_path: Path, capsys: object) -> None:
    log = MetricsLog(tmp_path, steps=9, start_step=0, tensorboard=False)
    for step in range(1, 6):
        log.write({**ROW, "step": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    log = MetricsLog(tmp_path, steps=9, start_step=3, tensorboard=False)
    log.write({**ROW, "step": 4, "loss": 2.0, "grad_norm": None, "skipped": True})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 2.0
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded[:2]] == [4, 5] and len(discarded) == 3


def test_first_cause_wins(tmp_path: Path) -> None:
    first, second = ExitStatus(tmp_path, rank=1), ExitStatus(tmp_path, rank=0)
    first.step = 7
    assert first.write(3, "bad shard") and not second.write(7, "lost a peer")
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert status == {"code": 3, "reason": "bad shard", "rank": 1, "step": 7, "resumable": False}
    assert [path.name for path in tmp_path.iterdir()] == ["exit_status.json"]
    second.clear()
    assert second.write(7, "lost a peer")
    assert json.loads((tmp_path / "exit_status.json").read_text())["resumable"] is True


def write_rows(run: Path, *steps: int, start_step: int = 0, tensorboard: bool = False) -> MetricsLog:
    log = MetricsLog(run, steps=9, start_step=start_step, tensorboard=tensorboard)
    for step in steps:
        log.write({**ROW, "step": step})
    return log


def steps_in(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_damaged_lines_are_set_aside_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path, 1, 2)
    damage = b'\xff\xfe\x00\n{"step": "x"}\n[1]\n' + b"[" * 50_000 + b'\n{"step": 3, "lo'
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    write_rows(tmp_path, 3, start_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert (tmp_path / "metrics.discarded.jsonl").read_bytes() == damage + b"\n"
    assert "warning" in (said := capsys.readouterr().err) and "5 damaged lines" in said


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link", "device"])
def test_what_is_no_file_is_renamed(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "tensorboard"):
        path = tmp_path / name
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir() if name == "metrics.jsonl" else path.write_text("a file")
        else:
            path.symlink_to("nowhere" if kind == "dangling link" else "/dev/full")
    assert write_rows(tmp_path, 1, tensorboard=True).close() == ""
    assert steps_in(tmp_path) == [1] and list((tmp_path / "tensorboard").iterdir())
    assert len([name for name in os.listdir(tmp_path) if ".bad-" in name]) == 2
    assert capsys.readouterr().err.count("renamed to") == 2


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_odd_things_at_names_of_a_run_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for name in ("exit_status.json", "recipe.yaml"):
        make(tmp_path / name)
    status = ExitStatus(tmp_path, rank=0)
    status.clear()
    assert status.write(75, "saved") and json.loads(status.path.read_text())["code"] == 75
    recipe = load_recipe("launch/recipes/tiny/stage2.yaml", overrides=[f"run.dir={tmp_path}"])
    _prepare_run_dir(SimpleNamespace(position=SimpleNamespace(rank=0), recipe=recipe))  # type: ignore[arg-type]
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_rows_go_on_when_the_storage_is_good_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_rows(tmp_path, 1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A part of the next row would fit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
    try:
        log.write({**ROW, "step": 2})
        log.write({**ROW, "step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size and "records lost: 2" in log.close()
    log.write({**ROW, "step": 4})
    assert steps_in(tmp_path) == [1, 4] and log.close() == ""
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and said.count("can be written again; records lost so far: 2") == 1


def test_scalars_are_read_by_tensorboard(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    write_rows(tmp_path, 4, 5, start_step=3, tensorboard=True)
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    version, start, *steps = loader.EventFileLoader(str(file)).Load()
    assert version.file_version == "brain.Event:2" and start.step == 4 and start.session_log.status == 1
    assert [event.step for event in steps] == [4, 5]
    assert "train/loss" in {value.tag for value in steps[0].summary.value}


def test_status_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    status = ExitStatus(tmp_path / "file", rank=0)
    assert status.write(6, "not finite") and status.failed
    said = capsys.readouterr().err
    assert "exit_status.json cannot be written" in said and '"code": 6, "reason": "not finite"' in said


def test_status_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    status = ExitStatus(tmp_path, rank=0)
    assert status.write(3, "first") and not status.write(7, "second")
    assert json.loads((tmp_path / "exit_status.json").read_text())["reason"] == "first"
    assert os.listdir(tmp_path) == ["exit_status.json"]
