"""When a save that is written in the background is committed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megavl.train import saves as module
from megavl.train.evaluation import Evaluation
from megavl.train.saves import Saves


class Store:
    """A store whose save under way is written or not."""

    def __init__(self) -> None:
        self.begun: int | None = 3
        self.written = False

    def is_written(self) -> bool:
        return self.written

    def finish(self) -> Path:
        self.begun = None
        return Path("iter_3")


def test_an_evaluation_commits_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.groups, "on_any_rank", lambda flag: flag)
    said: list[str] = []
    store, status = Store(), SimpleNamespace(section="evaluating", claim=SimpleNamespace(confirm=lambda: None))
    plan: Any = SimpleNamespace(say=said.append)
    state: Any = SimpleNamespace(store=store)
    evaluation: Any = SimpleNamespace(_asked_to_stop=lambda: False)
    evaluation._meanwhile = Saves(plan, state, status=status).finish_if_written  # type: ignore[arg-type]
    Evaluation._stop_if_asked(evaluation)
    assert said == [] and store.begun == 3
    store.written = True
    for _ in range(2):
        Evaluation._stop_if_asked(evaluation)
    assert said == ["saved iter_3"] and status.section == "evaluating"
