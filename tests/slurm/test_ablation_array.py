"""An ablation as job arrays of a real SLURM on two nodes gives the numbers of one machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_ablations import FOLDER, ROOT, ablate, command, environment, results

pytestmark = pytest.mark.slurm


@pytest.mark.slow
def test_arrays_on_two_nodes_give_the_same(cluster: Any, tmp_path: Path) -> None:
    path = FOLDER / "figure8.yaml"
    # One array task per node at a time, so that both nodes take part.
    words = [*command(tmp_path / "array", path), "--slurm", "--sbatch=--exclusive"]
    variables = {**cluster.environment, **{name: environment()[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}}
    shown = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    found = re.search(r"in the jobs ([\d, ]+);", shown.stdout)
    assert found is not None, shown.stdout
    last = found[1].split(", ")[-1]
    fields = cluster.wait_for(last, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
    logs = {log.name: log.read_text()[-2000:] for log in (tmp_path / "array/cache/slurm").iterdir()}
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), logs
    local = ablate(tmp_path / "local", path)
    assert local.returncode == 0, local.stderr
    assert results(tmp_path / "array", "figure8") == results(tmp_path / "local", "figure8")
    again = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert "0 tasks in the jobs" in again.stdout, again.stderr
