"""Shell scripts parse, and shellcheck gives no warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.rglob("launch/**/*.sh"), ROOT / ".ci" / "run"])
STAGE_SCRIPTS = sorted(
    ROOT / "launch" / f"{kind}_{size}.sh" for kind in ("warmup", "pretrain", "sft") for size in ("1b", "7b")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_parses(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shellcheck_is_clean() -> None:
    program = Path(sys.executable).parent / "shellcheck"
    command = [str(program if program.exists() else "shellcheck"), "-x", "-P", str(ROOT / "launch"), "-S", "warning"]
    done = subprocess.run([*command, *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", [*STAGE_SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_can_be_executed(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("script", STAGE_SCRIPTS, ids=lambda path: path.name)
def test_stage_scripts_request_what_they_need(script: Path) -> None:
    text = script.read_text()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(text.splitlines())
    # SLURM may send the signal 60 s early or late, and a step and a save need time too.
    lead = re.search(r"^#SBATCH --signal=USR1@(\d+)$", text, re.MULTILINE)
    assert lead is not None and int(lead[1]) >= 120
    assert re.search(rf"^launch {script.stem} {script.stem[-2:]}/stage[123]\.yaml \d+$", text, re.MULTILINE)
