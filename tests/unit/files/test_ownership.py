"""One owner of a directory at a time, and who takes over from whom."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavl.config.errors import StorageError, UsageError
from megavl.files import ownership
from megavl.files.owner import Owner
from megavl.files.ownership import current_owner, take
from megavl.files.process import Process
from tests.tmpfs import mounted

ELSEWHERE = "another boot pid:[1]"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner counts every 50 ms."""
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    monkeypatch.setattr(ownership, "_POLL_S", 0.02)
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gone() -> Process:
    """A process of this machine that has ended."""
    child = subprocess.Popen(["sleep", "1000"])
    process = Process.running(child.pid)
    assert process is not None and process.is_alive()
    child.kill()
    # Nobody has read its exit code: a zombie is gone, too.
    while process.is_alive():
        pass
    child.wait()
    assert process.is_alive() is False
    return process


def owned_by(directory: Path, owner: Owner, *, number: int = 1, beat: int = 0) -> Path:
    """Write what an owner leaves."""
    path = directory / f"owner-{number}.json"
    path.write_bytes(owner.encode(beat))
    return path


def elsewhere(**changes: object) -> Owner:
    """An owner on another machine."""
    process = Process(machine=ELSEWHERE, pid=17, started=4)
    return dataclasses.replace(Owner.this_process(), process=process, host="far", **changes)  # type: ignore[arg-type]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_second_owner_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    first = Owner.this_process()
    with take(tmp_path / "run", first, name="run.dir") as held:
        before = (tmp_path / "run/owner-1.json").read_bytes()
        with pytest.raises(UsageError) as refused:
            take(tmp_path / "run", Owner.this_process(), name="run.dir")
        said = str(refused.value)
        assert said.startswith("run.dir: ") and f"host {os.uname().nodename}, pid {os.getpid()}, SLURM job 42" in said
        assert first.since in said and held.token == first.token
        assert len(before) == (tmp_path / "run/owner-1.json").stat().st_size and names(tmp_path / "run") == [
            "owner-1.json"
        ]
    assert names(tmp_path / "run") == []
    take(tmp_path / "run", Owner.this_process(), name="run.dir").release()


def test_dead_owner_is_replaced_at_once(tmp_path: Path, gone: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "SILENCE_S", 1e9)
    owned_by(tmp_path, dataclasses.replace(Owner.this_process(), process=gone))
    told: list[str] = []
    with take(tmp_path, Owner.this_process(), name="run.dir", say=told.append):
        assert names(tmp_path) == ["owner-2.json"] and f"pid {gone.pid}" in told[0]


def test_number_of_the_dead_owner_may_be_used_again(tmp_path: Path) -> None:
    me = Process.this()
    owned_by(
        tmp_path, dataclasses.replace(Owner.this_process(), process=dataclasses.replace(me, started=me.started - 1))
    )
    take(tmp_path, Owner.this_process(), name="run.dir").release()


def test_living_owner_elsewhere_is_refused(tmp_path: Path) -> None:
    owner, end = elsewhere(), threading.Event()

    def count() -> None:
        beat = 0
        while not end.wait(0.02):
            owned_by(tmp_path, owner, beat=(beat := beat + 1))

    owned_by(tmp_path, owner)
    counting = threading.Thread(target=count)
    counting.start()
    try:
        with pytest.raises(UsageError, match="host far, pid 17"):
            take(tmp_path, Owner.this_process(), name="run.dir")
    finally:
        end.set()
        counting.join()


def test_silent_owner_elsewhere_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "SILENCE_S", 0.3)
    owned_by(tmp_path, elsewhere())
    told: list[str] = []
    with take(tmp_path, Owner.this_process(), name="run.dir", say=told.append):
        assert "watching for" in told[0] and "no sign of life" in told[1]


def test_requeued_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "SILENCE_S", 1e9)
    monkeypatch.setattr(ownership, "SHORT_SILENCE_S", 1e9)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    owned_by(tmp_path, elsewhere())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    take(tmp_path, Owner.this_process(), name="run.dir").release()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[1]", b"[" * 60_000, b'{"pid": -1}', b"0" * 100_000])
def test_file_that_names_nobody_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(ownership, "SHORT_SILENCE_S", 0.1)
    (tmp_path / "owner-7.json").write_bytes(content)
    with take(tmp_path, Owner.this_process(), name="run.dir", say=lambda _: None):
        assert names(tmp_path) == ["owner-8.json"]


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link"])
def test_odd_thing_in_the_way_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(ownership, "SHORT_SILENCE_S", 0.1)
    path = tmp_path / "owner-1.json"
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "dangling link": lambda: path.symlink_to("nowhere")}[kind]()
    take(tmp_path, Owner.this_process(), name="run.dir", say=lambda _: None).release()
    assert current_owner(tmp_path) is None


def test_ranks_of_a_killed_launcher_are_waited_for(tmp_path: Path, gone: Process) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    orphan = Process.running(child.pid)
    assert orphan is not None
    owned_by(tmp_path, dataclasses.replace(Owner.this_process(), process=orphan, launcher=gone))
    with pytest.raises(UsageError, match=f"orphans of a killed launcher.*pid {child.pid}"):
        take(tmp_path, Owner.this_process(), name="run.dir", say=lambda _: None, patience_s=0.1)
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        child.kill()

    take(tmp_path, Owner.this_process(), name="run.dir", say=say, patience_s=1e9).release()
    child.wait()
    assert "still leaving" in told[0]


def test_suspended_owner_learns_that_it_lost(tmp_path: Path) -> None:
    lost: list[UsageError] = []
    told = threading.Event()

    def on_lost(error: UsageError) -> None:
        lost.append(error)
        told.set()

    held = take(tmp_path, Owner.this_process(), name="run.dir", on_lost=on_lost)
    owned_by(tmp_path, elsewhere(), number=2)
    assert told.wait(600) and "taken over by another run (host far" in str(lost[0])
    with pytest.raises(UsageError, match="host far"):
        held.confirm()
    held.release()
    owner = current_owner(tmp_path)
    assert owner is not None and owner.host == "far"


def test_only_the_counter_of_an_owner_changes(tmp_path: Path) -> None:
    with take(tmp_path, Owner.this_process(), name="run.dir"):
        path = tmp_path / "owner-1.json"
        first, deadline = json.loads(path.read_bytes()), 10_000
        while (now := json.loads(path.read_bytes()))["beat"] < 2 and (deadline := deadline - 1):
            threading.Event().wait(0.05)
        assert {**now, "beat": first["beat"]} == first and now["beat"] >= 2


def test_removed_file_is_written_again(tmp_path: Path) -> None:
    with take(tmp_path, Owner.this_process(), name="run.dir"):
        (tmp_path / "owner-1.json").unlink()
        tries = 0
        while not names(tmp_path) and (tries := tries + 1) < 10_000:
            threading.Event().wait(0.05)
        with pytest.raises(UsageError):
            take(tmp_path, Owner.this_process(), name="run.dir")


def test_slow_process_does_not_take_what_others_took(tmp_path: Path, gone: Process) -> None:
    dead = dataclasses.replace(Owner.this_process(), process=gone)
    owned_by(tmp_path, dead)
    before = ownership._newest(tmp_path)
    fast = take(tmp_path, Owner.this_process(), name="run.dir", say=lambda _: None)
    fast.release()
    # The slow one has judged owner-1 long ago; meanwhile another run starts in the directory, now free.
    with take(tmp_path, Owner.this_process(), name="run.dir"):
        late = owned_by(tmp_path, Owner.this_process(), number=2)
        assert not ownership._is_confirmed(late, before, tmp_path)
        late.unlink()
    late = owned_by(tmp_path, Owner.this_process(), number=2)
    assert not ownership._is_confirmed(late, before, tmp_path)


_RACE = """
import os, sys, time
from pathlib import Path
from megavl.files.owner import Owner
from megavl.files.ownership import take
from megavl.config.errors import UsageError
directory, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, start - time.time()))
for _ in range(40):
    try:
        held = take(directory, Owner.this_process(), name="run.dir", say=lambda _: None)
    except UsageError:
        continue
    inside = directory / "inside"
    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
    inside.unlink()
    if _ % 3 == 0:
        os._exit(0)  # leaves its file, as a killed process does
    held.release()
"""


def test_never_two_owners_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RACE, str(tmp_path / "run"), str(time.time() + 1.0)]
    racers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(5)]
    for racer in racers:
        _, said = racer.communicate(timeout=600)
        assert racer.returncode == 0, said.decode()


def test_directory_that_takes_no_files_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="run.dir: cannot write to /proc "):
        take(Path("/proc"), Owner.this_process(), name="run.dir")


@pytest.mark.parametrize("kind", ["file", "parent is a file", "dangling link", "long name"])
def test_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "long name":
        path = tmp_path / ("x" * 300)
    else:
        path.write_text("")
        path = path / "below" if kind == "parent is a file" else path
    with pytest.raises(StorageError, match=r"run\.dir: cannot write to .*choose a writable directory"):
        take(path, Owner.this_process(), name="run.dir")


def test_path_with_a_null_byte_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.dir: .* is no path"):
        take(Path(f"{tmp_path}/a\0b"), Owner.this_process(), name="run.dir")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A full file system."""
    with mounted(tmp_path / "disk", options="size=64k") as disk:
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        yield disk


def test_full_disk_leaves_no_owner_file(small_disk: Path) -> None:
    with pytest.raises(StorageError, match="No space left"):
        take(small_disk, Owner.this_process(), name="run.dir")
    assert names(small_disk) == ["filler"]


def test_number_without_a_successor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "owner-999999999.json").write_text("forged")
    with pytest.raises(UsageError, match=r"run\.dir: .*owner-999999999\.json has a number .* remove the file"):
        take(tmp_path, Owner.this_process(), name="run.dir")
