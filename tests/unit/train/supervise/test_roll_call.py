"""Messages name the ranks that are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megavl.files.process import Process
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.roll_call import RollCall


def roll_call(run: Path, *, rank: int = 0, step: int = 3, section: str = "training") -> RollCall:
    status = ExitStatus(run, rank=rank)
    status.step, status.section = step, section
    found = RollCall(status, timeout_s=600)
    found.period_s = 0.02
    return found


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture
def here(tmp_path: Path, store: dist.Store) -> Iterator[RollCall]:
    """Rank 0 of three, at step 3 while training."""
    call = roll_call(tmp_path)
    call.begin(store, world_size=3)
    yield call
    call.end()


def row(rank: int, store: dist.Store, *, pid: int | None = None) -> None:
    """What a rank of another machine, or a process of this one, left when it was last seen."""
    other = roll_call(Path("/nowhere"), rank=rank, step=2, section="saving")
    other.begin(store, world_size=3)
    other.end()
    key = f"megavl/roll call/{rank}"
    found = json.loads(store.get(key))
    found |= {"host": "far", "machine": "another"} if pid is None else {"pid": pid}
    store.set(key, json.dumps(found))


def wait_for(words: str, call: RollCall) -> str:
    end = time.monotonic() + 300
    while words not in (found := call.missing()):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_a_silent_rank_is_named(tmp_path: Path, store: dist.Store, here: RollCall) -> None:
    row(1, store)
    alive = roll_call(tmp_path, rank=2)
    # A thread that starts late on a busy machine is no silent rank.
    alive.period_s, here.period_s = 0.01, 0.5
    alive.begin(store, world_size=3)
    found = wait_for("rank 1", here)
    alive.end()
    assert found.startswith("; missing: rank 1 (host far, pid ") and "no sign of life for " in found
    assert found.endswith("last seen at step 2 while saving)") and "rank 2" not in found


def test_a_process_that_is_gone_is_named_at_once(store: dist.Store, here: RollCall) -> None:
    here.period_s = 1000.0
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    row(1, store, pid=child.pid)
    row(2, store)
    assert (
        f"; missing: rank 1 (host {os.uname().nodename}, pid {child.pid}, gone, last seen at step 2" in here.missing()
    )


def test_a_rank_that_waits_elsewhere_is_named(tmp_path: Path, store: dist.Store, here: RollCall) -> None:
    others = [roll_call(tmp_path, rank=1, section="loading data"), roll_call(tmp_path, rank=2)]
    for other in others:
        other.begin(store, world_size=3)
        here.period_s = 1000.0
    assert wait_for("rank 1", here) == "; rank 1 is at step 3 while loading data"
    for other in others:
        other.end()


def test_a_rank_that_never_wrote_is_named(store: dist.Store, here: RollCall) -> None:
    row(1, store)
    assert "rank 2 (no sign of life since the ranks met)" in wait_for("rank 2", here)


def test_a_store_that_does_not_answer_names_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavl.train.supervise.roll_call._PATIENCE_S", 0.1)
    ended = threading.Event()

    class Stopped:
        def set(self, key: str, value: str, /) -> None:
            ended.wait()
            raise RuntimeError("the connection is closed")

    call = roll_call(tmp_path, rank=1)
    call.begin(Stopped(), world_size=2)  # type: ignore[arg-type]
    assert call.missing() == "; missing: rank 0, which holds the ranks' store"
    ended.set()
    call.end()


def test_the_holder_of_the_store_is_named_without_it(tmp_path: Path, store: dist.Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = Process.running(child.pid)
    assert process is not None
    found = {"count": 1, "step": 1, "section": "training", "host": "h", "pid": child.pid, "started": process.started}
    store.set("megavl/roll call/0", json.dumps({**found, "machine": process.machine}))
    call = roll_call(tmp_path, rank=1)
    call.begin(store, world_size=2)
    deadline = time.monotonic() + 300
    while call._holder is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    call.end()
    child.communicate()
    assert call.missing() == f"; missing: rank 0 (host h, pid {child.pid}, gone)"


def test_nothing_is_said_before_the_ranks_meet(tmp_path: Path) -> None:
    assert roll_call(tmp_path).missing() == ""
