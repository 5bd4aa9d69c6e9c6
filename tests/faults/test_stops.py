"""A run that is stopped, runs out of space and is killed within saves ends bitwise as the undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.two_ranks import Ranks, saved, state_bytes
from tests.tiny_run import metrics

COLUMNS = ("step", "modality", "loss", "grad_norm", "lr", "loss_tokens", "images", "consumed_samples")

ASYNC = "checkpoint.async_save=true"


def rows(run: Path) -> list[list[Any]]:
    return [[row[name] for name in COLUMNS] for row in metrics(run)]


def end(dataset: Path, run: Path, *overrides: str, fault: str = "") -> tuple[dict[int, int], dict[str, Any], str]:
    """Codes, exit status and output of a start."""
    ranks = Ranks(dataset, run, *overrides, fault=fault)
    codes, printed, _ = ranks.wait()
    return codes, ranks.status() if (run / "exit_status.json").exists() else {}, printed


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run; it saves at steps 3, 6 and 8."""
    run = tmp_path_factory.mktemp("reference")
    codes, status, printed = end(dataset, run)
    assert codes == {0: 0, 1: 0} and status["code"] == 0, printed
    return run


def check_equal(run: Path, reference: Path) -> None:
    assert rows(run) == rows(reference) and len(rows(run)) == 8
    assert state_bytes(run, 8) == state_bytes(reference, 8)


def test_stops_and_a_full_disk_change_nothing(dataset: Path, reference: Path, tmp_path: Path) -> None:
    # A signal to one rank within the first step: both save there.
    codes, status, printed = end(dataset, tmp_path, fault="training:1:1:sigusr1")
    assert codes == {0: 75, 1: 75} and (status["code"], status["step"], status["resumable"]) == (75, 1, True), printed
    assert saved(tmp_path) == [1]
    # Within an evaluation: it ends, and both save at the step that it belongs to.
    evaluating = (f"evaluation.held_out=[{dataset}/shards]", "evaluation.held_out_sequences=2", "evaluation.interval=2")
    codes, status, printed = end(dataset, tmp_path, *evaluating, fault="evaluating:1:2:sigterm")
    assert codes == {0: 75, 1: 75} and (status["code"], status["step"], status["resumable"]) == (75, 2, True), printed
    assert printed.count("a signal ended the evaluation after step 2") == 1 and saved(tmp_path) == [1, 2]
    # Within a save, and another one: that save stays, and the step after it is the last.
    codes, status, printed = end(
        dataset, tmp_path, *evaluating, fault="mid_shard:0:3:sigterm,after_manifest:0:3:sigusr1"
    )
    assert codes == {0: 75, 1: 75} and status["step"] == 4, printed
    assert saved(tmp_path) == [3, 4]
    # The evaluation that the signal ended came first.
    assert [row["step"] for row in metrics(tmp_path, "evaluation.jsonl")] == [2]
    # No space: the save at 6 is given up with one warning, the last one ends the run.
    codes, status, printed = end(dataset, tmp_path, ASYNC, fault="mid_shard:1:6:enospc,mid_shard:1:8:enospc")
    assert codes == {0: 5, 1: 5} and (status["code"], status["step"]) == (5, 8), printed
    assert printed.count("warning: ") == 1 and "training goes on without this checkpoint" in printed
    assert saved(tmp_path) == [3, 4]
    # Ctrl-C at one rank.
    codes, status, printed = end(dataset, tmp_path, fault="training:0:7:sigint")
    assert codes == {0: 130, 1: 130} and (status["code"], status["step"]) == (130, 7), printed
    assert "resuming after step 4" in printed and "Traceback" not in printed
    assert printed.count("stopped by Ctrl-C after step 7; saved") == 1 and saved(tmp_path) == [6, 7]
    # Within the last evaluation: all steps are done, and the next start evaluates.
    codes, status, printed = end(dataset, tmp_path, *evaluating, fault="evaluating:0:8:sigterm")
    assert codes == {0: 75, 1: 75} and status["code"] == 75 and "resuming after step 7" in printed
    codes, status, printed = end(dataset, tmp_path, *evaluating)
    assert codes == {0: 0, 1: 0} and status["code"] == 0 and "resuming after step 8" in printed
    assert [row["step"] for row in metrics(tmp_path, "evaluation.jsonl")] == [2, 8]
    check_equal(tmp_path, reference)


SITES = ["before_mkdir", "mid_shard", "after_shard", "after_manifest", "after_rename", "mid_retention"]


def kill_in_a_save(
    dataset: Path, reference: Path, run: Path, *, site: str, rank: int, changes: Sequence[str] = ()
) -> None:
    # Step 8 also has an older checkpoint to delete.
    step = 8 if site == "mid_retention" else 6
    codes, _, printed = end(dataset, run, *changes, fault=f"{site}:{rank}:{step}:sigkill")
    assert codes[rank] == -9 and codes[1 - rank] == 7, printed
    codes, _, printed = end(dataset, run, *changes)
    assert codes == {0: 0, 1: 0}, printed
    committed = site in ("after_rename", "mid_retention")
    if step == 6:
        assert f"resuming after step {6 if committed else 3}" in printed
    check_equal(run, reference)
    assert saved(run) == [6, 8]


@pytest.mark.parametrize(("site", "rank", "changes"), [("after_rename", 1, ()), ("mid_shard", 0, (ASYNC,))])
def test_a_kill_in_a_save_changes_nothing(
    dataset: Path, reference: Path, tmp_path: Path, site: str, rank: int, changes: Sequence[str]
) -> None:
    kill_in_a_save(dataset, reference, tmp_path, site=site, rank=rank, changes=changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), (ASYNC,)])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_a_kill_in_any_part_of_a_save_changes_nothing(
    dataset: Path, reference: Path, tmp_path: Path, site: str, rank: int, changes: Sequence[str]
) -> None:
    kill_in_a_save(dataset, reference, tmp_path, site=site, rank=rank, changes=changes)


def test_bad_steps_in_a_row_end_with_code_6(dataset: Path, tmp_path: Path) -> None:
    """Weights that one update of this rate makes infinite give no finite loss."""
    first = ("checkpoint.interval=1", "training.steps=1", "optimizer.warmup_steps=0")
    assert end(dataset, tmp_path, *first)[0] == {0: 0, 1: 0}
    before = state_bytes(tmp_path, 1)
    changes = ("checkpoint.interval=100", "training.steps=8", "optimizer.warmup_steps=0", "optimizer.lr=1e30")
    codes, status, printed = end(dataset, tmp_path, *changes)
    assert codes == {0: 6, 1: 6} and (status["code"], status["resumable"]) == (6, False), printed
    assert "Traceback" not in printed and "3 steps in a row up to" in status["reason"], printed
    bad = [row for row in metrics(tmp_path) if row["skipped"]]
    assert len(bad) == 3 and bad[-1]["step"] == status["step"], json.dumps(bad)
    assert saved(tmp_path) == [1] and state_bytes(tmp_path, 1) == before
