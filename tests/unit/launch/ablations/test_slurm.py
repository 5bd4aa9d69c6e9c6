"""What is handed to SLURM, with stand-ins for its commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.ablations.graph import Task
from launch.ablations.slurm import require_queued, submit
from megavl.config.errors import UsageError

FIRST = Task(kind="corpus", name="first", spec={"words": ["1"]})
SECOND = Task(kind="dataset", name="second", spec={"words": ["2"]}, inputs=(FIRST,))
SBATCH = """#!/bin/sh
count=$(ls "$TOLD"/job-* 2>/dev/null | wc -l)
case "$*" in *"$REFUSED"*) echo "sbatch: error: invalid account" >&2; exit 1 ;; esac
printf '%s\\n' "$@" >"$TOLD/job-$((count + 7))"
cat >"$TOLD/script-$((count + 7))"
echo "$((count + 7));cluster"
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with the words of every call."""
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    told.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "scancel": '#!/bin/sh\necho "$@" >"$TOLD/cancelled"\n',
        "squeue": '#!/bin/sh\ncat "$TOLD/queue"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("TOLD", str(told))
    monkeypatch.setenv("REFUSED", "--never")
    return told


def queue(tmp_path: Path, *, extra: str = "", done: tuple[bool, bool] = (False, False)) -> list[str]:
    return submit(
        [FIRST, SECOND], done, command=["launch/ablate.py", "x.yaml"], name="x", cache=tmp_path / "cache", extra=extra
    )


def test_every_job_gets_the_options(told: Path, tmp_path: Path) -> None:
    assert queue(tmp_path, extra="--partition=cpu --time=5") == ["7", "8", "9"]
    words = {path.name: path.read_text().splitlines() for path in told.glob("job-*")}
    assert all({"--partition=cpu", "--time=5"} <= set(one) for one in words.values()) and len(words) == 3
    assert "--array=0" in words["job-7"] and "--array=1" in words["job-8"]
    assert "--dependency=afterok:7" in words["job-8"] and "--dependency=afterok:8" in words["job-9"]
    assert "--cell $SLURM_ARRAY_TASK_ID" in (told / "script-8").read_text()
    assert "--cell" not in (told / "script-9").read_text()


def test_refusal_cancels_what_was_queued(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSED", "x-report")
    with pytest.raises(UsageError, match="sbatch refused: sbatch: error: invalid account"):
        queue(tmp_path)
    assert (told / "cancelled").read_text() == "7 8\n"


def test_queued_tasks_are_not_queued_again(told: Path, tmp_path: Path) -> None:
    queue(tmp_path)
    (told / "queue").write_text("8\n9\n300\n")
    with pytest.raises(UsageError, match="1 of the tasks are in the queue already; .*: scancel 8$"):
        queue(tmp_path, done=(True, False))
    assert len(list(told.glob("job-*"))) == 3
    (told / "queue").write_text("300\n")
    assert len(queue(tmp_path, done=(True, False))) == 2


@pytest.mark.parametrize(
    "extra",
    ["--array=1-9", "-d afterok:1", "--wrap=true", "-a0-3", "-dafterok:1", "--arra=0-1", "--depend=x", "--test-only"],
)
def test_option_that_breaks_the_order_is_refused(told: Path, tmp_path: Path, extra: str) -> None:
    with pytest.raises(UsageError, match="is set for each job by this program"):
        queue(tmp_path, extra=extra)
    assert not list(told.iterdir())


@pytest.mark.parametrize("extra", ["job.sh", "--time=5 job.sh"])
def test_script_of_another_is_refused(told: Path, tmp_path: Path, extra: str) -> None:
    with pytest.raises(UsageError, match=r"--sbatch job\.sh: belongs to no option"):
        queue(tmp_path, extra=extra)


def test_option_with_a_value_of_its_own_is_passed(told: Path, tmp_path: Path) -> None:
    assert queue(tmp_path, extra="-p cpu --time 5 --account=a --exclusive") == ["7", "8", "9"]


def test_job_of_another_task_is_refused(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    require_queued(SECOND, cache=tmp_path / "cache")
    with pytest.raises(UsageError, match="first is not what this job was queued for"):
        require_queued(FIRST, cache=tmp_path / "cache")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "99")
    require_queued(FIRST, cache=tmp_path / "cache")


def test_damaged_record_of_a_job_is_named(told: Path, tmp_path: Path) -> None:
    queue(tmp_path)
    (tmp_path / "cache/slurm/8.json").write_text("[")
    with pytest.raises(UsageError, match=r"8\.json: is damaged; remove it"):
        queue(tmp_path)


def test_sbatch_without_a_number_is_refused(told: Path, tmp_path: Path) -> None:
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho would start\n")
    with pytest.raises(UsageError, match="gave no number of a job but 'would start"):
        queue(tmp_path)


def test_jobs_are_recorded_with_their_tasks(told: Path, tmp_path: Path) -> None:
    queue(tmp_path)
    assert json.loads((tmp_path / "cache/slurm/8.json").read_text()) == [SECOND.address]
