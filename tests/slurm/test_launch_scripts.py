"""The launch scripts with stand-ins for sbatch, srun and scontrol: what they start, and when they requeue a job."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.recipe_facts import overrides_from, split_extra
from megavl.config.load import load_recipe
from tests.slurm.stand_ins import JOB, ROOT, STAND_INS, TINY, TOOLS, Stage

SCRIPTS = [f"{kind}_{size}" for kind in ("warmup", "pretrain", "sft") for size in ("1b", "7b")]


# --- what is started --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_commands_and_starts_nothing(cluster_login: Stage, script: str) -> None:
    recipe = str(ROOT / "launch" / "recipes" / script[-2:] / "stage2.yaml")
    code, out, err = cluster_login.run(script, RECIPE=recipe, DRY_RUN="1", RUN_DIR="")
    assert code == 0, err
    submitted, started = out.splitlines()
    assert shlex.split(submitted)[0] == "sbatch" and f"launch/{script}.sh" in submitted
    words = shlex.split(started)
    nodes = int(words[words.index("-N") + 1])
    assert int(words[words.index("-n") + 1]) == 8 * nodes
    assert words[-4:] == ["-m", "megavl", "train", recipe]
    assert not cluster_login.called("sbatch") and not cluster_login.called("srun")


def test_login_node_submits_itself(cluster_login: Stage) -> None:
    code, out, err = cluster_login.run(NODES="2", GPUS_PER_NODE="2")
    assert (code, out) == (0, "Submitted batch job 41\n"), err
    (call,) = cluster_login.called("sbatch")
    assert {"--nodes=2", "--ntasks-per-node=2", "launch/pretrain_7b.sh", "--export=ALL"} <= set(call)
    assert f"--output={cluster_login.run_dir}/slurm-%j.out" in call
    assert not any(word.startswith("--gres") for word in call)


def test_gpus_are_requested_where_the_cluster_has_some(cluster_login: Stage) -> None:
    assert cluster_login.run(NODES="1", GPUS_PER_NODE="4", GRES="gpu:h100:8(S:0-1)")[0] == 0
    assert "--gres=gpu:4" in cluster_login.called("sbatch")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"EXTRA": "training.stepz=3"}, "did you mean 'steps'?"),
        ({"RECIPE": "launch/recipes/none.yaml"}, "cannot read the recipe"),
        ({"NODES": "1", "GPUS_PER_NODE": "3"}, "3 processes are no multiple of"),
        ({"DATA": "/d", "EXTRA": 'data.sources=[{"path":"/e"}]'}, "DATA: every entry"),
    ],
)
def test_a_mistake_ends_before_the_queue(cluster_login: Stage, settings: dict[str, str], message: str) -> None:
    code, _, err = cluster_login.run(**settings)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert not cluster_login.called("sbatch")
    assert not cluster_login.run_dir.exists()


def test_settings_become_overrides(cluster_login: Stage) -> None:
    settings = {"TP": "1", "PP": "2", "DATA": "/d a", "TOKENIZER": "/t", "INIT": "/i", "RUN_DIR": "/r"}
    extra = "parallel.layout=[2,2] parallel.sequence_parallel=false  run.dir=/last"
    code, out, err = cluster_login.run(**settings, EXTRA=extra, DRY_RUN="1", **JOB)
    assert code == 0, err
    words = shlex.split(out)
    assert words[words.index("train") + 2 :] == [
        "parallel.tensor=1",
        "parallel.pipeline=2",
        'data.root="/d a"',
        "data.tokenizer=/t",
        "checkpoint.init=/i",
        "run.dir=/r",
        "parallel.layout=[2,2]",
        "parallel.sequence_parallel=false",
        "run.dir=/last",
    ]


ODD = [
    *(
        "/tmp/a #b",
        "1e3",
        "no",
        "null",
        "~",
        "nan",
        "2026-11-29",
        "[1]",
        "{a: b}",
        "*a",
        "!!int 3",
        "- a",
        "a: b",
        "x#y",
    ),
    *('a"b', "it's", "a\\b", " a ", "a\nb", "a\tb", "a\u2028b", "ü 😀", "$HOME", "`id`", "a,b=c d=e", "%j"),
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_a_path_stays_the_text_it_is(text: str) -> None:
    settings = {"RUN_DIR": text, "DATA": text, "INIT": text, "TOKENIZER": text}
    recipe = load_recipe(ROOT / TINY, overrides=overrides_from(settings))
    assert [recipe.run.dir, recipe.data.root, recipe.checkpoint.init, recipe.data.tokenizer] == [text] * 4


def test_extra_divides_at_blanks_outside_of_quotes() -> None:
    extra = """ run.dir="/a b" data.sources=[{path: '/it''s c', weight: 1}]\tcheckpoint.init=/it's training.steps=3 """
    assert split_extra(extra) == [
        'run.dir="/a b"',
        "data.sources=[{path: '/it''s c', weight: 1}]",
        "checkpoint.init=/it's",
        "training.steps=3",
    ]


@pytest.mark.parametrize("text", ["/tmp/a #b", "no", "a'b\" 100%"])
def test_a_launch_passes_odd_paths_on(cluster_login: Stage, text: str) -> None:
    folder = str(cluster_login.folder / text)
    code, out, err = cluster_login.run(RUN_DIR=folder, DRY_RUN="1", **JOB)
    assert code == 0, err
    assert load_recipe(ROOT / TINY, overrides=[shlex.split(out)[-1]]).run.dir == folder
    code, out, err = cluster_login.run(RUN_DIR=folder)
    assert code == 0, err
    assert cluster_login.called("sbatch")[0][-2] == f"--output={folder.replace('%', '%%')}/slurm-%j.out"


@pytest.mark.parametrize("settings", [{"TP": "2 "}, {"PP": "x"}, {"NODES": "a[$(id)]"}, {"GPUS_PER_NODE": "08"}])
def test_a_setting_that_is_no_number_is_refused(plain_machine: Stage, settings: dict[str, str]) -> None:
    code, _, err = plain_machine.run(**settings)
    assert code == 2 and next(iter(settings)) in err and "whole number" in err, err


def test_a_leftover_job_without_srun_is_answered(plain_machine: Stage) -> None:
    code, _, err = plain_machine.run(SLURM_JOB_ID="41")
    assert code == 2 and "unset SLURM_JOB_ID" in err


def test_a_leftover_job_without_a_cluster_is_answered(cluster_login: Stage) -> None:
    # Programs of SLURM that are installed, but not configured.
    says = "scontrol: error: resolve_ctls_from_dns_srv: unable to find configuration source"
    (cluster_login.folder / "bin/scontrol").write_text(f'#!/bin/bash\necho "{says}" >&2\nexit 1\n')
    code, _, err = cluster_login.run(SLURM_JOB_ID="41")
    assert code == 2 and "unset SLURM_JOB_ID" in err and not cluster_login.called("srun"), err


@pytest.mark.parametrize(
    ("says", "over"),
    [
        ({"JOB_STATE": ""}, True),
        ({"SQUEUE_SAYS": "2", "JOB_STATE": "slurm_load_jobs error: Invalid job id specified"}, True),
        ({"SQUEUE_SAYS": "2", "JOB_STATE": "slurm_load_jobs error: Unable to contact slurm controller"}, False),
    ],
    ids=["forgotten", "invalid", "no controller"],
)
def test_a_job_that_has_ended_is_answered(cluster_login: Stage, says: dict[str, str], over: bool) -> None:
    code, _, err = cluster_login.run(**JOB, **says, DRY_RUN="1")
    assert code == (2 if over else 0) and ("unset SLURM_JOB_ID" in err) == over, err


def test_relative_paths_are_the_callers(cluster_login: Stage) -> None:
    recipe = cluster_login.folder / "own.yaml"
    recipe.write_text((ROOT / TINY).read_text().replace("base.yaml", str(ROOT / "launch/recipes/tiny/base.yaml")))
    code, out, err = cluster_login.run(cwd=cluster_login.folder, RECIPE="own.yaml", RUN_DIR="run", DRY_RUN="1", **JOB)
    assert code == 0, err
    assert shlex.split(out)[-2:] == [str(recipe), f"run.dir={cluster_login.run_dir}"]


def test_allocation_starts_one_rank_per_gpu(cluster_login: Stage) -> None:
    code, _, err = cluster_login.run(SLURM_CPUS_ON_NODE="8", **JOB)
    assert code == 0, err
    (call,) = cluster_login.called("srun")
    expected = {"-N": "2", "-n": "4"}
    assert {flag: call[call.index(flag) + 1] for flag in expected} == expected
    assert {"--ntasks-per-node=2", "--kill-on-bad-exit=1", "--cpus-per-task=4"} <= set(call)
    assert not cluster_login.called("scontrol", "requeue")


def test_first_node_is_the_meeting_point(cluster_login: Stage) -> None:
    _, out, _ = cluster_login.run(DRY_RUN="1", **JOB)
    assert {"MASTER_ADDR=alpha", "MASTER_PORT=10041", "LOCAL_WORLD_SIZE=2"} <= set(shlex.split(out))


def test_without_slurm_torchrun_starts_one_model(plain_machine: Stage) -> None:
    code, out, err = plain_machine.run(DRY_RUN="1")
    assert code == 0, err
    words = shlex.split(out)
    assert {"torch.distributed.run", "--standalone", "--nproc-per-node=4", "--max-restarts=0"} <= set(words)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1" in words


def test_without_slurm_two_nodes_are_refused(plain_machine: Stage) -> None:
    code, _, err = plain_machine.run(NODES="2")
    assert code == 2 and "needs SLURM" in err


# --- when a job is requeued -------------------------------------------------------------------------------------------


def status(stage: Stage, code: int) -> dict[str, str]:
    content = {"code": code, "reason": "as the test says", "rank": 1, "step": 9, "resumable": code in (7, 75)}
    return {"STATUS_FILE": str(stage.run_dir / "exit_status.json"), "STATUS_CONTENT": json.dumps(content)}


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 600
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_saves_and_requeues_once(cluster_login: Stage, name: str) -> None:
    process = cluster_login.start(**JOB, AWAIT_SIGNAL="1", SRUN_CODE="75")
    wait_for(cluster_login.folder / "calls.ready", process)
    process.send_signal(getattr(signal, f"SIG{name}"))
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 75, err
    assert cluster_login.called("srun", "got") == [["srun", "got", name]]
    assert cluster_login.called("scontrol", "requeue") == [["scontrol", "requeue", "41"]]


def test_ctrl_c_saves_and_does_not_requeue(cluster_login: Stage) -> None:
    """srun keeps Ctrl-C to itself, so the tasks get USR1."""
    process = cluster_login.start(**JOB, AWAIT_SIGNAL="1", SRUN_CODE="75")
    wait_for(cluster_login.folder / "calls.ready", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 130 and "not requeued" in err, err
    assert cluster_login.called("srun", "got") == [["srun", "got", "USR1"]]
    assert not cluster_login.called("scontrol", "requeue")


def test_a_cancelled_job_is_not_requeued(cluster_login: Stage) -> None:
    code, _, err = cluster_login.run(**JOB, SRUN_CODE="75", JOB_STATE="COMPLETING None")
    assert code == 75 and "left alone" in err
    assert not cluster_login.called("scontrol", "requeue")


def test_a_job_at_its_time_limit_is_requeued(cluster_login: Stage) -> None:
    cluster_login.run(**JOB, SRUN_CODE="75", JOB_STATE="COMPLETING TimeLimit")
    assert cluster_login.called("scontrol", "requeue")


@pytest.mark.parametrize("srun_code", [0, 1, 2, 3, 4, 5, 6])
def test_other_ends_are_final(cluster_login: Stage, srun_code: int) -> None:
    code, _, err = cluster_login.run(**JOB, SRUN_CODE=str(srun_code))
    assert code == srun_code
    assert not cluster_login.called("scontrol", "requeue")
    assert srun_code == 0 or "not requeued" in err


def test_the_runs_code_replaces_the_launchers(cluster_login: Stage) -> None:
    """A wrong recipe ends rank 1 with 2, and srun kills the others: 137, which alone would be requeued."""
    cluster_login.run_dir.mkdir()
    code, _, _ = cluster_login.run(**JOB, SRUN_CODE="137", **status(cluster_login, 2))
    assert code == 2
    assert not cluster_login.called("scontrol", "requeue")


def test_an_old_status_does_not_count(cluster_login: Stage) -> None:
    cluster_login.run_dir.mkdir()
    (cluster_login.run_dir / "exit_status.json").write_text('{"code": 2}\n')
    code, _, _ = cluster_login.run(**JOB, SRUN_CODE="75")
    assert code == 75


@pytest.mark.parametrize("srun_code", [7, 137, 143])
def test_crashes_are_requeued_while_checkpoints_advance(cluster_login: Stage, srun_code: int) -> None:
    limit = {"MAX_RESTARTS": "2", "SRUN_CODE": str(srun_code)}
    assert [cluster_login.run(**JOB, **limit)[0] for _ in range(2)] == [srun_code, srun_code]
    # A committed checkpoint is progress; a directory without a manifest is not.
    (cluster_login.run_dir / "checkpoints" / "iter_0000009").mkdir(parents=True)
    checkpoint = cluster_login.run_dir / "checkpoints" / "iter_0000005"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    assert [cluster_login.run(**JOB, **limit)[0] for _ in range(2)] == [srun_code, srun_code]
    code, _, err = cluster_login.run(**JOB, **limit)
    assert code == 1
    assert "2 restarts brought no checkpoint after iter_0000005; giving up" in err
    assert len(cluster_login.called("scontrol", "requeue")) == 4


def test_without_slurm_the_runs_code_is_returned(plain_machine: Stage) -> None:
    """torchrun would make it 1: here a stand-in interpreter ends as torchrun does."""
    stand_in = plain_machine.folder / "python"
    stand_in.write_text(
        f'#!/bin/bash\ncase "$*" in *recipe_facts*) exec {sys.executable} "$@";; esac\n'
        'mkdir -p "$RUN_DIR"; echo "{\\"code\\": 75, \\"step\\": 3}" >"$RUN_DIR/exit_status.json"; exit 1\n'
    )
    stand_in.chmod(0o755)
    code, _, err = plain_machine.run(PYTHON=str(stand_in))
    assert code == 75 and "start the same command again" in err


def test_a_refused_start_returns_2_and_leaves_the_status_there(plain_machine: Stage) -> None:
    """The directory is another run's: the status of the refused one is written elsewhere."""
    stand_in = plain_machine.folder / "python"
    stand_in.write_text(
        f'#!/bin/bash\ncase "$*" in *recipe_facts*) exec {sys.executable} "$@";; esac\n'
        'echo "{\\"code\\": 2, \\"step\\": 0}" >"$MEGAVL_EXIT_STATUS"; exit 1\n'
    )
    stand_in.chmod(0o755)
    plain_machine.run_dir.mkdir()
    there = plain_machine.run_dir / "exit_status.json"
    there.write_text('{"code": 7}\n')
    code, _, err = plain_machine.run(PYTHON=str(stand_in))
    assert code == 2, err
    assert there.read_text() == '{"code": 7}\n'


STUCK = """#!/bin/bash
case "$*" in *recipe_facts*) exec PYTHON "$@";; esac
trap '' TERM INT USR1
mkdir -p "$RUN_DIR"
bash -c 'trap "" TERM INT USR1; touch "$RUN_DIR/started"; while :; do sleep 1; done' &
if [ -n "$FAILS" ]; then echo '{"code": 7, "step": 3}' >"$RUN_DIR/exit_status.json"; fi
wait
exit 1
"""


@pytest.mark.parametrize("how", ["a failure", "Ctrl-C twice"])
def test_a_stuck_rank_does_not_hold_the_launcher(plain_machine: Stage, how: str) -> None:
    stand_in = plain_machine.folder / "python"
    stand_in.write_text(STUCK.replace("PYTHON", sys.executable))
    stand_in.chmod(0o755)
    process = plain_machine.start(PYTHON=str(stand_in), FAILS="1" if how == "a failure" else "")
    wait_for(plain_machine.run_dir / "started", process)
    if how == "Ctrl-C twice":
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == (7 if how == "a failure" else 130), err


def test_stand_ins_do_not_leak(cluster_login: Stage) -> None:
    """The tests above prove nothing if the real programs are reached."""
    assert os.environ["PATH"] != cluster_login.environment()["PATH"]
    assert {path.name for path in (cluster_login.folder / "bin").iterdir()} <= {*TOOLS, *STAND_INS}
