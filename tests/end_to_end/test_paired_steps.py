"""Steps under several settings in turn, as the benchmarks of balance and grouping take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.bench import balance, tiny_runs
from tests.tiny_run import environment, forked

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["parallel.tensor=1", "parallel.pipeline=2", "training.global_batch_size=2", "training.micro_batch_size=1"]
VARIANTS = {"even": ("parallel.layout=[2,2]",), "uneven": ("parallel.layout=[1,3]",)}


@pytest.mark.slow
def test_turns_are_equal_work_and_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Steps need not wait for quick cores.
    monkeypatch.setattr(tiny_runs, "QUICK", 1e9)
    for name, value in forked(environment()).items():
        monkeypatch.setenv(name, value)
    settings = [
        *tiny_runs.build_data(tmp_path / "data", images=1, seq_length=128, text_bytes=100_000),
        *SIZES,
        "data.multimodal_fraction=0.5",
    ]
    out = tmp_path / "steps.jsonl"
    for turns in (1, 2):
        rows, others = tiny_runs.paired_steps(out, settings, VARIANTS, processes=2, turns=turns, steps=2)
    assert rows == [json.loads(line) for line in out.read_text().splitlines()] and 0 <= others < 1

    assert [row["turn"] for row in rows] == [0] * 4 + [0] * 4 + [1] * 4
    assert [row["variant"] for row in rows] == ["even", "even", "uneven", "uneven"] * 3
    kinds = {name: [(row["modality"], row["images"]) for row in rows if row["variant"] == name] for name in VARIANTS}
    assert kinds["even"] == kinds["uneven"] and set(kinds["even"]) == {("text", 0), ("multimodal", 2)}
    for row in rows:
        spent = [sum(box["seconds"] for box in row["segments"] if box["rank"] == rank) for rank in (0, 1)]
        assert row["probe_s"] > 0 and row["seconds"] > 0 and min(spent) > 0
        # Two micro-batches on each rank.
        assert [len(loops) for loops in row["short_probes_s"]] == [2, 2] and min(map(min, row["short_probes_s"])) > 0


def test_starts_of_a_single_turn_are_told_apart() -> None:
    turn = [{"turn": 0, "variant": name, "short_probes_s": [[1.0]]} for name in balance.VARIANTS for _ in range(2)]
    faster = [{**row, "short_probes_s": [[0.7]]} for row in turn]
    assert balance.starts([*turn, *faster]) == [turn, faster]
    assert balance.quick_share([*turn, *faster]) == 1


def test_one_fast_loop_makes_no_rank_slow() -> None:
    loops = [[0.8, *[1.0] * 59], [*[1.15] * 59, 2.0]]
    (quick,) = balance.quick_loops([{"turn": 0, "variant": "even", "short_probes_s": loops}])
    assert quick[0].all() and quick[1, :-1].all() and not quick[1, -1]


def test_the_pilot_run_chooses_the_depth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ratios = dict.fromkeys(balance.PILOT_DEPTHS, 0.0)

    def pilot(out: Path, settings: list[str], variants: dict[str, tuple[str, ...]], **_: int) -> object:
        rows = []
        for name, ratio in zip(variants, ratios.values(), strict=True):
            boxes = [
                {"rank": rank, "micro_batch": at, "seconds": seconds}
                for rank, seconds in ((0, ratio), (1, 1.0))
                for at in range(balance.BATCH)
            ]
            rows.append({"variant": name, "modality": "multimodal", "segments": boxes})
        return rows, 0.0

    monkeypatch.setattr(balance, "paired_steps", pilot)
    low, high = balance.PILOT_DEPTHS
    ratios.update({low: balance.OVERLOAD - 0.1, high: balance.OVERLOAD + 0.1})
    assert balance.encoder_depth(tmp_path, []) == (low + high) / 2
    ratios[high] = balance.OVERLOAD - 0.05
    with pytest.raises(SystemExit, match="outside of what the pilot run saw"):
        balance.encoder_depth(tmp_path, [])


def test_steps_on_slow_cores_are_left_out() -> None:
    rows = [{"probe_s": seconds} for seconds in (1.2, 1.0, 1.25, 1.26, 1.9)]
    assert tiny_runs.undisturbed(rows) == rows[:3]


def test_cycles_on_slow_cores_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 24
    monkeypatch.setattr(balance, "BATCH", count)
    rows = []
    for number in range(10):
        clock = 1.0 if number < 5 else 0.7  # of the cores, in two starts
        slow = [{number + 4}, {number + 4, number + 5}]  # micro-batches of each rank
        boxes = [("waiting", None, 0.5)]
        for at in range(count):
            # A slow core takes 0.3 s longer for a micro-batch, for which the other one waits.
            boxes.append(("waiting", None, 0.3 if slow[1] & {at} else 0.02))
            boxes += [("decoder forward", at, 0.1), ("decoder backward", at, 0.45 if slow[0] & {at} else 0.15)]
            boxes.append(("adaptor backward", at, 0.05))
        first = [{"what": what, "micro_batch": at, "rank": 0, "seconds": spent} for what, at, spent in boxes]
        second = [{**box, "rank": 1} for box in first if box["micro_batch"] is not None]
        loops = [[(1.5 if at in slow[rank] else 1.1) * clock for at in range(count)] for rank in (0, 1)]
        loops[0][0] = clock
        seconds = 1.0 + sum(box["seconds"] for box in first)
        common = {"variant": "even", "turn": number % 5, "segments": first + second}
        common |= {"short_probes_s": loops, "seconds": seconds}
        rows += [{**common, "modality": "multimodal"}, {**common, "modality": "text", "seconds": seconds / 2}]
    found = balance.read(rows, "even", [5, 5])
    assert found.cycle_s == pytest.approx(0.32) and found.stages_s == pytest.approx((0.3, 0.3))
    # 21 cycles of a step have a micro-batch before and two after; one slow one of either rank takes five of them.
    assert found.cycles == 10 * (count - 3 - 5)
    assert found.rest_s == pytest.approx(1.0 + 0.5 + 0.32)
    assert found.seconds == pytest.approx((count - 1) * 0.32 + 1.82) and found.median > found.seconds
    assert found.text == pytest.approx(0.5)
    assert balance.quick_share(rows) == pytest.approx(1 - 1.5 / count)
    with pytest.raises(SystemExit, match="32 cycles and .* of even on quick cores, 40 needed; take more turns"):
        balance.read(rows[:4], "even", [5, 5])
