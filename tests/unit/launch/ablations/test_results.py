"""Results from the logs of runs: values, verdicts, page and figure."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from launch.ablations.definition import read_ablation
from launch.ablations.figures import draw
from launch.ablations.graph import Graph, build_graph
from launch.ablations.records import DONE
from launch.ablations.results import cost_of, page, read_results
from megavl.config.errors import DataError
from tests.unit.launch.ablations.test_definition import FOLDER

GAIN = read_ablation(FOLDER / "figure8.yaml").simulations[0].title
BITS = {"grouped": (2.0, 2.1, 2.3), "mixed": (2.1, 2.2, 2.4)}
EASY = {"grouped": (0.5, 0.6, 0.7), "mixed": (0.9, 0.3, 0.6)}
WORST = {"grouped": 9.2, "mixed": 9.5}
"""Bits per byte half way."""
SECONDS = {"grouped": {"text": 0.1, "multimodal": 0.3}, "mixed": {"text": 0.25, "multimodal": 0.25}}
COST = {"hours": 1.5, "commits": ["abc"]}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.chdir(FOLDER.parents[1])
    return build_graph(read_ablation(FOLDER / "figure8.yaml"), size="tiny", seeds=3)


def evaluation(step: int, *, bits: float, easy: float) -> dict[str, Any]:
    tasks = {"eval": {"accuracy": easy, "margin": 0.1, "loss": 1.0}, "eval_hard": {"accuracy": 0.25}}
    return {"step": step, "tasks": tasks, "held_out": {"text_heldout": {"text": {"bits_per_byte": bits}}}}


def row_of_step(step: int, *, arm: str) -> dict[str, Any]:
    modality = ("text", "multimodal")[step % 2]
    # One step in a hundred is disturbed.
    seconds = 9.0 if step % 100 == 0 else SECONDS[arm][modality]
    return {"step": step, "loss": float(step), "modality": modality, "tokens": 512, "step_time_s": seconds}


def fill(graph: Graph, cache: Path) -> None:
    """Logs as the runs would leave them."""
    for task in graph.tasks:
        (cache / task.address).mkdir(parents=True)
        content = {"seconds": 36.0, "commits": ["abc"], "conditions": [["a", 2]], "tokens": 1000, "steps": 10}
        (cache / task.address / DONE).write_text(json.dumps(content))
    for cell in graph.cells:
        run = cache / cell.runs[-1].address / "run"
        run.mkdir()
        rows = [
            evaluation(0, bits=9.0, easy=0.25),
            evaluation(150, bits=WORST[cell.arm], easy=0.3),
            evaluation(300, bits=BITS[cell.arm][cell.seed - 1], easy=EASY[cell.arm][cell.seed - 1]),
        ]
        (run / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "cut')
        steps = [row_of_step(n, arm=cell.arm) for n in range(1, 301)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))


def test_claims_are_judged_by_pairs(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    ablation = read_ablation(FOLDER / "figure8.yaml")
    found = read_results(ablation, graph, size="tiny", cache=tmp_path)
    assert found.values("bits_per_byte", "grouped") == list(BITS["grouped"])
    language, easy, _ = found.claims()
    # The values of the arms overlap, but each pair differs by 0.1, and less is better.
    assert language["difference"]["mean"] == pytest.approx(0.1) and language["verdict"] == "confirmed"
    assert language["effect"], "both arms went far from where they started"
    assert easy["difference"]["mean"] == pytest.approx(0.0) and easy["verdict"] == "too small to tell"
    assert found.tokens == {"grouped": 2000, "mixed": 2000}


def test_page_and_json_hold_the_numbers(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    found = read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
    cost = cost_of(graph, cache=tmp_path)
    assert cost == {"hours": pytest.approx(len(graph.tasks) * 36 / 3600), "commits": ["abc"]}
    text = "\n".join(page(found, name="figure8", command="COMMAND", cost=COST, simulations={GAIN: 0.008}))
    for part in (
        "| **confirmed** |",
        "2.1333 [1.7",
        "1.50 hours",
        "code abc",
        "COMMAND",
        f"| {GAIN} | +0.8% |",
        "figure8.svg",
    ):
        assert part in text
    plain = json.loads(json.dumps(found.to_dict(simulations={"gain": 0.008})))
    assert plain["arms"]["grouped"]["measures"]["bits_per_byte"]["values"] == list(BITS["grouped"])
    assert plain["curves"]["easy"]["mixed"]["2"] == [[0, 0.25], [150, 0.3], [300, 0.3]]
    assert "seconds" not in json.dumps(plain)


def test_arms_at_chance_tell_nothing(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    found = read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
    hard = found.claims()[2]
    assert hard["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert not hard["effect"] and hard["verdict"] == "too small to tell"


def test_worst_value_of_a_run_is_judged(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    plain = read_ablation(FOLDER / "figure8.yaml")
    name, claim = "bits_per_byte", dataclasses.replace(plain.claims[0], kind="better")
    measures = {**plain.measures, name: dataclasses.replace(plain.measures[name], reduce="worst")}
    worst = dataclasses.replace(plain, measures=measures, claims=(claim,))
    found = read_results(worst, graph, size="tiny", cache=tmp_path)
    assert found.values(name, "grouped") == [9.2] * 3
    (row,) = found.claims()
    assert row["difference"]["mean"] == pytest.approx(0.3) and row["verdict"] == "confirmed"


def test_speed_is_judged_on_the_page(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    found = read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
    (speed,) = found.speeds()
    assert found.step_seconds["grouped"][1] == pytest.approx(0.2) and speed["difference"]["mean"] == pytest.approx(0.25)
    text = "\n".join(page(found, name="figure8", command="COMMAND", cost=COST, simulations={}))
    assert "| grouped steps are faster on one process | 5% | +25.0% | [+25.0%, +25.0%] | **confirmed** |" in text
    assert "grouped steps 0.200, mixed steps 0.250" in text


@pytest.mark.parametrize("conditions", [[["b", 2]], [["a", 1]], [["b", 2], ["a", 2]], []], ids=str)
def test_speed_under_other_conditions_is_not_judged(graph: Graph, tmp_path: Path, conditions: list[Any]) -> None:
    fill(graph, tmp_path)
    note = tmp_path / next(cell for cell in graph.cells if cell.arm == "mixed").runs[-1].address / DONE
    note.write_text(json.dumps(json.loads(note.read_text()) | {"conditions": conditions}))
    found = read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
    (speed,) = found.speeds()
    assert speed["verdict"] == "too small to tell" and speed["difference"]["mean"] == pytest.approx(0.25)
    text = "\n".join(page(found, name="figure8", command="COMMAND", cost=COST, simulations={}))
    assert "on other machines, or with another number of runs at a time" in text


def test_titles_are_plain_text(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    plain = read_ablation(FOLDER / "figure8.yaml")
    arms = {name: dataclasses.replace(arm, title=f"{name} | $5 \\frac$") for name, arm in plain.arms.items()}
    found = read_results(dataclasses.replace(plain, arms=arms), graph, size="tiny", cache=tmp_path)
    assert "mixed | $5 \\frac$" in " ".join(xml.etree.ElementTree.fromstring(draw(found)).itertext())
    text = "\n".join(page(found, name="figure8", command="COMMAND", cost=COST, simulations={}))
    assert "| mixed \\| $5 \\frac$ |" in text


def test_simulation_is_shown_in_its_unit(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    plain = read_ablation(FOLDER / "figure8.yaml")
    one = dataclasses.replace(plain.simulations[0], title="seconds", unit="number")
    found = read_results(dataclasses.replace(plain, simulations=(one,)), graph, size="tiny", cache=tmp_path)
    text = "\n".join(page(found, name="figure8", command="COMMAND", cost=COST, simulations={"seconds": 0.35}))
    assert "| seconds | 0.35 |" in text


def test_seeds_with_few_steps_of_a_kind_have_equal_curves(graph: Graph, tmp_path: Path) -> None:
    """The number of text steps differs from seed to seed."""
    fill(graph, tmp_path)
    plain = read_ablation(FOLDER / "figure8.yaml")
    measure = dataclasses.replace(plain.measures["loss"], source="training", key="loss", modality="text")
    for cell in graph.cells:
        log = tmp_path / cell.runs[-1].address / "run/metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        kinds = ["text" if row["step"] <= 6 + cell.seed else "multimodal" for row in rows]
        log.write_text("".join(json.dumps({**row, "modality": kind}) + "\n" for row, kind in zip(rows, kinds)))
    measures = {**plain.measures, "loss": measure}
    found = read_results(dataclasses.replace(plain, measures=measures), graph, size="tiny", cache=tmp_path)
    assert {len(curve) for curve in found.curves["loss"]["mixed"].values()} == {7}


def test_equal_results_give_equal_figures(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    found = read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
    first = draw(found)
    assert first == draw(found)
    shown = " ".join(xml.etree.ElementTree.fromstring(first).itertext())
    assert "grouped steps" in shown and "mixed steps" in shown and "3 seeds" in shown


def test_missing_number_is_named(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    run = tmp_path / graph.cells[0].runs[-1].address / "run"
    (run / "evaluation.jsonl").write_text('{"step": 300, "tasks": {"eval": {"accuracy": null}}, "held_out": {}}\n')
    with pytest.raises(DataError, match=r"measures\.bits_per_byte\.key: .* at step 300 of .*arm grouped, seed 1"):
        read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 150), r"evaluation\.jsonl: ends at step 150 of 300 \(arm grouped, seed 1\)"),
        ((), r"evaluation\.jsonl: ends at step 0 of 300"),
        ((0, 300), r"measures\.bits_per_byte: arm grouped has it at the steps \[0, 300\] with seed 1, and at \[0, 150"),
    ],
)
def test_incomplete_log_is_refused(graph: Graph, tmp_path: Path, steps: tuple[int, ...], message: str) -> None:
    fill(graph, tmp_path)
    run = tmp_path / graph.cells[0].runs[-1].address / "run"
    rows = [json.dumps(evaluation(step, bits=2.0, easy=0.5)) + "\n" for step in steps]
    (run / "evaluation.jsonl").write_text("".join(rows))
    with pytest.raises(DataError, match=message):
        read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
