"""launch/TUTORIAL.md works as written: its `bash` blocks run in order, in one shell, with fewer images and steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.tiny_run import ROOT, environment, forked, metrics

SMALLER = {"IMAGES": "60", "HELDOUT": "4", "STEPS_1": "11", "STEPS_2": "16", "STEPS_3": "11"}


def test_tutorial_runs_from_images_to_chat(tmp_path: Path) -> None:
    text = (ROOT / "launch" / "TUTORIAL.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert all(f"${{{name}:-" in blocks[0] for name in (*SMALLER, "WORK")), "the first block explains every variable"
    # The commands that the reader's activated environment would find; `megavl` is forked.
    installed, commands = Path(sys.executable).parent, tmp_path / "bin"
    env = forked({**environment(), "TORCHDYNAMO_DISABLE": "1", **SMALLER, "WORK": str(tmp_path)})
    commands.mkdir()
    (commands / "megavl").write_text(f'#!/bin/sh\nexec {env["PYTHON_EXEC"]} {installed / "megavl"} "$@"\n')
    (commands / "megavl").chmod(0o700)
    env["PATH"] = os.pathsep.join([str(commands), str(installed), os.environ["PATH"]])
    script = "\n".join(["set -euo pipefail", *blocks])
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("killed", "resuming after step 10", "all equal", "multimodal"):
        assert expected in done.stdout + done.stderr
    losses = re.findall(r"^ +2 \"step\": (1[12]),", done.stdout, re.MULTILINE)
    assert losses[:2] == ["11", "12"], "the discarded steps have the losses of the final ones"
    repeated = {row["step"]: row["loss"] for row in metrics(tmp_path / "stage2", "metrics.discarded.jsonl")}
    final = {row["step"]: row["loss"] for row in metrics(tmp_path / "stage2")}
    assert list(final) == list(range(1, 17))
    assert all(final[step] == loss for step, loss in repeated.items())
