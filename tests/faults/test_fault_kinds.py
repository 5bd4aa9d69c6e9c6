"""Every kind of fault within a step: how each rank ends, and that the first cause is the one that is recorded."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.two_ranks import BOUND_S, Ranks, saved

LOST = 7
WAIT = "parallel.timeout_s=20"
"""Long enough for a step on a busy machine."""
KINDS: dict[str, tuple[int, int]] = {
    # By kind: how the faulty rank ends, and the code that exit_status.json holds.
    "raise": (1, 1),
    "segfault": (-signal.SIGSEGV, LOST),
    "lock": (LOST, LOST),
}
MORE = {
    "async": (1, 1),
    "handler": (1, 1),
    "abort": (-signal.SIGABRT, LOST),
    "sigkill": (-signal.SIGKILL, LOST),
    "sigterm": (75, 75),
    "sigusr1": (75, 75),
    "sigint": (130, 130),
    "eio": (1, 1),
}


def check_kind(dataset: Path, run: Path, site: str, kind: str, report_table: Any) -> None:
    own, recorded = {**KINDS, **MORE}[kind]
    timeout = WAIT if kind == "lock" else "parallel.timeout_s=600"
    ranks = Ranks(dataset, run, timeout, "checkpoint.interval=2", fault=f"{site}:1:3:{kind}")
    codes, printed, seconds = ranks.wait()
    report_table(f"{kind} in {site}: codes {codes} after {seconds:.1f} s")
    status = ranks.status()
    assert codes == {0: own if own in (75, 130) else LOST, 1: own} and seconds < BOUND_S, printed
    assert (status["code"], status["step"]) == (recorded, 3), status
    if own < 0:
        assert "missing: rank 1 (host " in status["reason"] and ", gone, last seen at step" in status["reason"], status
    assert status["rank"] == (1 if own == 1 else status["rank"]) and saved(run) == ([2, 3] if own in (75, 130) else [2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_ends_every_rank(dataset: Path, tmp_path: Path, kind: str, report_table: Any) -> None:
    check_kind(dataset, tmp_path, "training", kind, report_table)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["load_data", "training"])
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_any_fault_ends_every_rank(dataset: Path, tmp_path: Path, site: str, kind: str, report_table: Any) -> None:
    check_kind(dataset, tmp_path, site, kind, report_table)


@pytest.mark.parametrize("site", ["training", pytest.param("evaluating", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_left_alone(dataset: Path, tmp_path: Path, site: str) -> None:
    evaluation = (f"evaluation.held_out=[{dataset}/shards]", "evaluation.held_out_sequences=2", "evaluation.interval=3")
    ranks = Ranks(dataset, tmp_path, WAIT, *evaluation, fault=f"{site}:1:3:sigstop")
    first = ranks.processes.pop(0)
    printed = first.communicate(timeout=BOUND_S)[0]
    assert first.returncode == LOST, printed
    status = ranks.status()
    assert (status["code"], status["rank"], status["step"]) == (LOST, 0, 3) and f"while {site}" in status["reason"]
    owner = r"host \S+, pid \d+, no sign of life for \d+ s, last seen at step \d while [a-z ]+"
    assert re.search(rf"missing: rank 1 \({owner}\)", status["reason"]), status
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    ranks.wait()
