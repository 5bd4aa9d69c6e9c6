"""The queue, with a stand-in for the process that forks the programs."""

from __future__ import annotations

import dataclasses
import json
import platform
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.ablations import runner
from launch.ablations.graph import Task
from launch.ablations.records import DONE, SPENT, commit
from launch.ablations.runner import Runner, Stopped, TaskFailed, launcher_environment
from megavl.config.errors import PeerError
from megavl.files.owner import Owner
from megavl.files.ownership import current_owner

TASK = Task(kind="corpus", name="corpus x", spec={"words": []})
NOTE = '{"seconds": 1.0, "commits": []}'
Behaviour = Callable[[], dict[str, int]]


class Programs:
    """Programs that end as a test says."""

    def __init__(self, behaviour: Behaviour, *, at_close: Callable[[], None] = lambda: None) -> None:
        self.signals: list[int] = []
        self.behaviour, self.close = behaviour, at_close

    def start(self, *_: object, **__: object) -> None:
        """Nothing starts."""

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def ended(self) -> dict[str, int]:
        return self.behaviour()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(programs: Programs, *, signals: list[int] | None = None) -> None:
        monkeypatch.setattr(runner, "Engine", lambda: programs)
        Runner(tasks=[TASK], cache=tmp_path, jobs=1, signals=signals if signals is not None else []).run()

    return run


def test_folder_is_free_after_its_program(run: Callable[..., None], tmp_path: Path) -> None:
    owners: list[Owner | None] = []

    def fail() -> dict[str, int]:
        if current_owner(tmp_path / TASK.address):
            raise PeerError("gone")
        return {}

    with pytest.raises(PeerError):
        run(Programs(fail, at_close=lambda: owners.append(current_owner(tmp_path / TASK.address))))
    assert owners[0] is not None and current_owner(tmp_path / TASK.address) is None


def test_lost_folder_is_left_to_the_other(run: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / TASK.address

    def lose() -> dict[str, int]:
        if not (folder / "owner-1.json").exists():
            return {}
        other = dataclasses.replace(Owner.this_process(), token="other")
        (folder / "owner-2.json").write_bytes(other.encode(0))
        threading.Timer(0.5, lambda: (folder / DONE).write_text(NOTE)).start()
        programs.behaviour = dict
        return {TASK.address: 0}

    programs = Programs(lose)
    run(programs)
    assert (folder / DONE).read_text() == NOTE


def test_seconds_are_of_all_starts(run: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / TASK.address
    signals: list[int] = []
    folder.mkdir()
    (folder / SPENT).write_text('{"seconds": 100.0, "commits": ["abc"], "conditions": [["other", 2]]}')

    def interrupted() -> dict[str, int]:
        if not current_owner(folder):
            return {}
        signals.append(signal.SIGTERM)
        return {TASK.address: -15} if programs.signals else {}

    programs = Programs(interrupted)
    with pytest.raises(Stopped):
        run(programs, signals=signals)
    first = json.loads((folder / SPENT).read_text())["seconds"]
    assert first > 100
    run(Programs(lambda: {TASK.address: 0} if current_owner(folder) else {}))
    note = json.loads((folder / DONE).read_text())
    assert note["seconds"] > first and note["commits"] == ["abc", commit()]
    assert note["conditions"] == [["other", 2], [platform.node(), 1]]
    assert json.loads((folder / SPENT).read_text())["seconds"] > first


def test_run_that_still_saves_is_waited_for(run: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / TASK.address
    (folder / "run").mkdir(parents=True)
    ours = folder / "run/owner-1.json"
    ours.write_bytes(Owner.this_process().encode(0))
    started: list[bool] = []
    programs = Programs(lambda: {TASK.address: 0} if started else {})
    programs.start = lambda *_, **__: started.append(ours.exists())  # type: ignore[method-assign]
    threading.Timer(0.5, ours.unlink).start()
    run(programs)
    assert started == [False]


def test_failure_has_the_code_of_its_program(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="corpus x ended with code 3") as found:
        run(Programs(lambda: {TASK.address: 3} if current_owner(tmp_path / TASK.address) else {}))
    assert found.value.code == 3


def test_launch_script_gets_no_settings_of_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECIPE", "TP", "PP", "DATA", "TOKENIZER", "INIT", "RUN_DIR", "EXTRA", "DRY_RUN", "NODES"):
        monkeypatch.setenv(name, "1")
    found = launcher_environment("recipe.yaml")
    assert found["RECIPE"] == "recipe.yaml" and found["NODES"] == "1" and found["PATH"]
    assert not {"TP", "PP", "DATA", "TOKENIZER", "INIT", "RUN_DIR", "EXTRA", "DRY_RUN"} & found.keys()
