"""Cores that automatic decoding processes of a rank may take."""

from __future__ import annotations

import os

import pytest

from megavl.train.stage_steps import _own_cores


@pytest.mark.parametrize(
    ("cores", "allowed", "ranks", "own"),
    [(64, 64, 8, 8), (64, 6, 8, 6), (2, 2, 4, 1), (8, None, 2, 4), (None, None, 1, 1)],
)
def test_cores_are_shared_by_ranks(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, allowed: int | None, ranks: int, own: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    if allowed is None:
        # As on macOS.
        monkeypatch.delattr(os, "sched_getaffinity")
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)))
    assert _own_cores() == own
