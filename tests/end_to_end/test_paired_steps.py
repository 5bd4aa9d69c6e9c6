"""Steps under several settings by turns, as the benchmarks of balance and grouping take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["parallel.tensor=1", "parallel.pipeline=2", "training.global_batch_size=2", "training.micro_batch_size=1"]
VARIANTS = {"even": ("parallel.layout=[2,2]",), "uneven": ("parallel.layout=[1,3]",)}


@pytest.fixture
def bench(open_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """launch/bench/plan_cpu.py, whose recipe is named from the root."""
    monkeypatch.chdir(ROOT)
    return open_benchmark("plan_cpu")


def test_turns_are_equal_work_and_go_on(bench: ModuleType, tmp_path: Path) -> None:
    settings = [*bench.build_data(tmp_path / "data", images=1, seq_length=128), *SIZES, "data.multimodal_fraction=0.5"]
    out = tmp_path / "steps.jsonl"
    for turns in (1, 2):
        rows, others = bench.paired_steps(out, settings, VARIANTS, processes=2, turns=turns, steps=2)
    assert rows == [json.loads(line) for line in out.read_text().splitlines()] and 0 <= others < 1

    assert [row["turn"] for row in rows] == [0] * 4 + [0] * 4 + [1] * 4
    assert [row["variant"] for row in rows] == ["even", "even", "uneven", "uneven"] * 3
    kinds = {name: [(row["modality"], row["images"]) for row in rows if row["variant"] == name] for name in VARIANTS}
    assert kinds["even"] == kinds["uneven"] and set(kinds["even"]) == {("text", 0), ("multimodal", 2)}
    for row in rows:
        spent = [sum(box["seconds"] for box in row["segments"] if box["rank"] == rank) for rank in (0, 1)]
        assert row["probe_s"] > 0 and row["seconds"] > 0 and min(spent) > 0
        # Two micro-batches on each rank.
        assert [len(loops) for loops in row["glances_s"]] == [2, 2] and min(map(min, row["glances_s"])) > 0


def test_steps_beside_slow_cores_are_left_out(bench: ModuleType) -> None:
    rows = [{"probe_s": seconds} for seconds in (1.2, 1.0, 1.25, 1.26, 1.9)]
    assert bench.undisturbed(rows) == rows[:3]


def test_a_step_beside_quick_cores_follows_from_slow_ones(
    open_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch/bench"))
    without_slow = open_benchmark("balance").without_slow
    rng = np.random.default_rng(0)
    slow = rng.uniform(0.3, 1.0, (64, 2))
    exact = 2.5 + 0.7 * slow[:, 0] + 0.1 * slow[:, 1]
    assert without_slow(exact, slow) == pytest.approx((2.5, 0), abs=1e-9)
    assert without_slow(exact - 0.7 * slow[:, 0], slow * [0, 1])[0] == pytest.approx(2.5)  # one core is never slow
    found = [without_slow(exact + rng.normal(0, 0.05, 64), slow) for _ in range(200)]
    off = [(value - 2.5) / error for value, error in found]
    assert abs(np.mean(off)) < 0.25 and 0.85 < np.std(off) < 1.15, "standard errors are as large as the errors"
