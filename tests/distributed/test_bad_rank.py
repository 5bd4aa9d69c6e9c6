"""A gradient that is not finite on one replica alone: every replica skips the step, and none changes a bit."""

from __future__ import annotations

import json
import math
import subprocess

import pytest

from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, free_port


@pytest.mark.parametrize(("bf16", "distributed"), [("0", "0"), ("1", "1")])
def test_all_ranks_skip_and_change_nothing(bf16: str, distributed: str) -> None:
    env = forked(environment())
    command = [env["PYTHON_EXEC"], "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "tests.distributed.bad_rank", bf16, distributed]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    assert rows[0]["losses"] == rows[1]["losses"] and all(map(math.isfinite, rows[0]["losses"]))
    for row in rows:
        assert row["skipped"] == [False, True, False]
        assert row["changed"] == [] and row["tensors"] > 100 and row["moved later"] > 100
