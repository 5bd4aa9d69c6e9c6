"""One run at a time writes an output folder, also where the file system has no flock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.pipeline.output import Output
from megavl.config.errors import StorageError, UsageError
from megavl.files.owner import Owner
from megavl.files.process import Process
from tests.unit.data.corpus_files import make_corpus, make_tokenizer, run_preprocess


@pytest.fixture(params=["flock", "no flock"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Output:
    if request.param == "no flock":
        _without_flock(monkeypatch)
    return Output(str(tmp_path / "out"))


def _without_flock(monkeypatch: pytest.MonkeyPatch, *, code: int = errno.ENOLCK) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def _lock(output: Output, task: int = 0, tasks: int = 1) -> ExitStack:
    return output.lock(array_task=task, array_tasks=tasks)


def test_whole_run_excludes_every_other(output: Output) -> None:
    with _lock(output):
        for other in ((0, 1), (0, 2), (1, 2)):
            with pytest.raises(UsageError, match=r"--output .*another (run|process)"):
                _lock(output, *other)
    _lock(output).close()


def test_array_tasks_share_but_none_runs_twice(output: Output) -> None:
    with _lock(output, 0, 2), _lock(output, 1, 2):
        for other in ((0, 1), (0, 2), (1, 2)):
            with pytest.raises(UsageError, match=r"--output .*another (run|process)"):
                _lock(output, *other)
    _lock(output, 1, 2).close()
    _lock(output).close()


def test_merges_wait_for_each_other(output: Output) -> None:
    _lock(output, 0, 2).close()
    order: list[str] = []

    def second() -> None:
        with output.alone():
            order.append("second")

    with output.alone():
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=600)
    assert order == ["first", "second"]


@pytest.mark.parametrize("name", ["whole", "1-of-2"])
def test_lock_of_a_killed_run_is_taken_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    _without_flock(monkeypatch, code=errno.ENOSYS)
    left = tmp_path / "out/units/lock-owners" / name
    left.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as killed:
        process = Process.running(killed.pid)
        assert process is not None
        (left / "owner-1.json").write_bytes(replace(Owner.this_process(), process=process).encode(3))
        with pytest.raises(UsageError, match=f"pid {killed.pid}"):
            _lock(Output(str(tmp_path / "out")))
        killed.kill()
    with _lock(Output(str(tmp_path / "out"))):
        pass
    with _lock(Output(str(tmp_path / "out")), 0, 2):
        pass
    assert list(left.iterdir()) == []


def test_array_task_names_the_lock_of_another_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _without_flock(monkeypatch)
    left = tmp_path / "out/units/lock-owners/whole"
    left.mkdir(parents=True)
    elsewhere = replace(Process.this(), machine="another")
    (left / "owner-1.json").write_bytes(replace(Owner.this_process(), process=elsewhere, host="node7").encode(3))
    with pytest.raises(UsageError, match=f"node7.*If it is gone, delete {left}"):
        _lock(Output(str(tmp_path / "out")), 0, 2)
    shutil.rmtree(left)
    with _lock(Output(str(tmp_path / "out")), 0, 2), _lock(Output(str(tmp_path / "out")), 1, 2):
        pass


def test_other_errors_of_a_lock_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _without_flock(monkeypatch, code=errno.EIO)
    with pytest.raises(StorageError, match="Input/output error"):
        _lock(Output(str(tmp_path / "out")))


def test_run_without_flock_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer, (text, *_) = make_tokenizer(tmp_path / "tokenizer"), make_corpus(tmp_path / "in", images=1, texts=5)
    assert run_preprocess([text], tokenizer=tokenizer, output=tmp_path / "usual") == 0
    _without_flock(monkeypatch)
    for task in (1, 0):
        more = ["--task", str(task), "--num-tasks", "2"]
        assert run_preprocess([text], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    made, usual = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.is_file()}
        for name in ("out", "usual")
    )
    assert made == usual
