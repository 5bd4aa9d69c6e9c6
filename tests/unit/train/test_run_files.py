"""metrics.jsonl after a resume; exit_status.json holds the first cause."""

from __future__ import annotations

import json
from pathlib import Path

from megavl.train.metrics import MetricsLog
from megavl.train.supervise.exit_status import ExitStatus

ROW = {
    "step": 0,
    "modality": "text",
    "loss": 1.5,
    "grad_norm": 0.1,
    "lr": 1e-3,
    "images": 0,
    "step_time_s": 0.5,
    "tokens_per_s": 100.0,
    "loss_tokens": 10,
    "mfu": None,
    "skipped": False,
}


def test_resume_keeps_one_row_per_step(tmp_path: Path, capsys: object) -> None:
    log = MetricsLog(tmp_path, steps=9, start_step=0, tensorboard=False)
    for step in range(1, 6):
        log.write({**ROW, "step": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    log = MetricsLog(tmp_path, steps=9, start_step=3, tensorboard=False)
    log.write({**ROW, "step": 4, "loss": 2.0, "grad_norm": None, "skipped": True})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 2.0
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded[:2]] == [4, 5] and len(discarded) == 3


def test_first_cause_wins(tmp_path: Path) -> None:
    first, second = ExitStatus(tmp_path, rank=1), ExitStatus(tmp_path, rank=0)
    first.step = 7
    assert first.write(3, "bad shard") and not second.write(7, "lost a peer")
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert status == {"code": 3, "reason": "bad shard", "rank": 1, "step": 7, "resumable": False}
    assert [path.name for path in tmp_path.iterdir()] == ["exit_status.json"]
    second.clear()
    assert second.write(7, "lost a peer")
    assert json.loads((tmp_path / "exit_status.json").read_text())["resumable"] is True
