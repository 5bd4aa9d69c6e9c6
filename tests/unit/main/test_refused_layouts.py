"""Commands refuse a layout that cannot work with exit code 2 and one line; it names the nearest that works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megavl.files.new_folder import work_folder

RECIPE = """
model: {preset: 7b}
parallel: {tensor: 4, pipeline: 4, sequence_parallel: true}
optimizer: {lr: 4.2e-5}
data: {sources: [{path: data}], tokenizer: tok, seq_length: 4096, multimodal_fraction: 0.3}
training: {stage: 2, steps: 100, global_batch_size: 64}
run: {dir: %s}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "7b.yaml"
    file.write_text(RECIPE % (tmp_path / "run"))
    return file


def megavl(*arguments: object, world: int = 16) -> tuple[int, str, str]:
    """Exit code and both outputs of one rank of `world`, whose peers do not exist."""
    launched = {"WORLD_SIZE": str(world), "RANK": "0", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29999"}
    command = [sys.executable, "-m", "megavl", *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **launched}, capture_output=True, text=True, check=False, timeout=1800
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor=3"], 16, "parallel.tensor: 3 does not divide model.llm.num_attention_heads 32"),
        (["parallel.layout=[8,8,8,8]"], 16, "parallel.layout: [8, 8, 8, 8] adds up to 32 layers"),
        ([], 96, "training.global_batch_size: 64 is no multiple of data-parallel ranks 6"),
        (["parallel.virtual_pipeline=2", "training.global_batch_size=12"], 32, "6 micro-batches a step"),
        (["parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.vision=split_tp"], 16, "parallel.vision"),
        ([], 24, "24 processes are no multiple of parallel.tensor 4 x parallel.pipeline 4 = 16"),
        (["data.seq_length=4098"], 16, "1 x 4098 tokens of a micro-batch are no multiple of parallel.tensor 4"),
    ],
    ids=["heads", "layers", "batch", "virtual stages", "vision", "world", "sequence"],
)
def test_training_is_refused_before_anything_starts(path: Path, overrides: list[str], world: int, message: str) -> None:
    status = path.parent / "run" / "exit_status.json"
    status.parent.mkdir()
    status.write_text(json.dumps({"code": 75, "reason": "of an earlier start"}))
    code, out, error = megavl("train", path, *overrides, world=world)
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, "one message, no traceback"
    assert message in error
    assert f"nearest that works on {world} devices: parallel.tensor=" in error
    assert list(path.parent.glob("run/*")) == [status], "only the exit status is written"
    found = json.loads(status.read_text())
    assert found["code"] == 2 and f"error: {found['reason']}\n" == error and not found["resumable"]
    assert out == ""


def test_typed_refusals_leave_a_running_run_alone(path: Path) -> None:
    command = [sys.executable, "-m", "megavl", "train", str(path), "optimizer.lrr=1"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 2 and "lrr" in done.stderr
    assert not (path.parent / "run").exists()


def test_the_suggested_layout_works(path: Path) -> None:
    _, _, error = megavl("train", path, "parallel.tensor=3", world=16)
    named = re.findall(r"\S+=\S+", error.partition("nearest that works on 16 devices: ")[2])
    assert len(named) >= 5
    code, out, error = megavl("plan", path, *named, "--devices", 16, "--device", "a100", "--top", 0)
    assert code == 0, error
    assert "16 x a100: tensor 2 x pipeline 4 x data 2" in out or "16 x a100: tensor 4 x pipeline 4" in out


def test_too_little_memory_names_a_layout_that_fits(path: Path) -> None:
    one = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false"]
    code, out, error = megavl("plan", path, *one, "--devices", 8, "--device", "a100-pcie", "--top", 0)
    assert code == 2
    assert error.startswith("error: parallel: pipeline rank 0 needs ") and error.count("\n") == 1
    assert "one a100-pcie has 37.25 GiB; nearest that works on 8 devices: parallel.tensor=" in error
    assert "ABOVE 90%" in out, "the plan itself is shown"


def test_overrides_may_follow_options(path: Path) -> None:
    options = ("--device", "a100", "--top", 0, "--json")
    overrides = ("parallel.tensor=2", "data.sources=[{name: web-code}]", "data.sources.web-code.path=elsewhere")
    before, after = (megavl("plan", path, *words) for words in ((*overrides, *options), (*options, *overrides)))
    assert before[0] == 0 and json.loads(before[1])["tensor"] == 2 and before == after
    code, _, error = megavl("plan", path, *options, "parallel.tensor=2", "--tp")
    assert code == 2 and "unrecognized arguments" in error and "--tp" in error


@pytest.mark.parametrize("images", ["nan", "-1", "7.2", "inf"])
def test_images_that_no_sequence_holds_are_refused(path: Path, images: str) -> None:
    code, out, error = megavl("plan", path, f"--images={images}")
    assert (code, out) == (2, "")
    assert error.startswith("error: --images: a sequence of 4096 tokens cannot have ") and "give 0 to 7.1" in error


def test_calibrations_are_refused_before_they_start(path: Path) -> None:
    file = path.with_name("c.json")
    code, _, error = megavl("plan", path, "--calibrate", file, "--images", "nan", world=4)
    assert code == 2 and "cannot have nan images" in error
    code, _, error = megavl("plan", path, "--calibrate", file, world=6)
    assert code == 2 and "parallel.tensor 4 does not divide the number of processes, 6; start `torchrun" in error
    code, _, error = megavl("plan", path, "--calibrate", path / "c.json", world=4)
    assert code == 2 and "its folder is missing or not writable" in error
    with work_folder(file, name="--calibrate"):
        code, _, error = megavl("plan", path, "--calibrate", file, world=4)
    assert code == 2 and "error: --calibrate: " in error and "is in use by another process" in error
    assert not file.exists() and not list(path.parent.glob(".*"))


def test_parallel_auto_is_planned_but_not_trained(path: Path) -> None:
    code, _, error = megavl("train", path, "parallel=auto")
    assert code == 2
    assert "`megavl plan" in error and "parallel: auto" in error
    code, _, error = megavl("plan", path, "parallel=auto", "--device", "a100")
    assert (code, error.partition(":")[2][:10]) == (2, " --devices")
    code, out, error = megavl("plan", path, "parallel=auto", "--devices", 16, "--device", "a100", "--top", 3)
    assert code == 0, error
    pasted = [line for line in out.splitlines() if re.match(r"(parallel|recompute|training): \{", line)]
    assert len(pasted) == 3
    recipe = path.with_name("pasted.yaml")
    merged = path.read_text().replace("parallel: {tensor: 4, pipeline: 4, sequence_parallel: true}", pasted[0])
    recipe.write_text(merged + pasted[1] + "\n")
    code, again, error = megavl("plan", recipe, "--devices", 16, "--device", "a100", "--top", 0, "--json")
    assert code == 0, error
    assert "16 x a100: tensor" in out and '"fits": true' in again


def test_without_any_layout_plan_says_why(path: Path) -> None:
    code, _, error = megavl("plan", path, "parallel=auto", "--devices", 1, "--device", "a100-pcie")
    assert code == 2
    assert "layouts works on 1 x a100-pcie" in error and "too little memory" in error
