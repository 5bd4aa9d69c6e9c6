"""Results from the logs of runs: values, verdicts, page and figure."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from launch.ablations.definition import read_ablation
from launch.ablations.figures import draw
from launch.ablations.graph import Graph, build_graph
from launch.ablations.results import cost_of, page, read_results
from launch.ablations.runner import DONE
from megavl.config.errors import DataError
from tests.unit.launch.ablations.test_definition import FOLDER

BITS = {"grouped": (2.0, 2.1, 2.3), "mixed": (2.1, 2.2, 2.4)}
EASY = {"grouped": (0.5, 0.6, 0.7), "mixed": (0.9, 0.3, 0.6)}
COST = {"hours": 1.5, "commits": ["abc"]}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.chdir(FOLDER.parents[1])
    return build_graph(read_ablation(FOLDER / "figure8.yaml"), size="tiny", seeds=3)


def evaluation(step: int, *, bits: float, easy: float) -> dict[str, Any]:
    tasks = {"eval": {"accuracy": easy, "margin": 0.1, "loss": 1.0}, "eval_hard": {"accuracy": 0.25}}
    return {"step": step, "tasks": tasks, "held_out": {"text_heldout": {"text": {"bits_per_byte": bits}}}}


def fill(graph: Graph, cache: Path) -> None:
    """Logs as the runs would leave them."""
    for task in graph.tasks:
        (cache / task.address).mkdir(parents=True)
        content = {"seconds": 36.0, "commit": "abc", "tokens": 1000, "steps": 10}
        (cache / task.address / DONE).write_text(json.dumps(content))
    for cell in graph.cells:
        run = cache / cell.runs[-1].address / "run"
        run.mkdir()
        rows = [
            evaluation(0, bits=9.0, easy=0.25),
            evaluation(10, bits=BITS[cell.arm][cell.seed - 1], easy=EASY[cell.arm][cell.seed - 1]),
        ]
        (run / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "cut')
        steps = [{"step": n, "loss": float(n), "modality": ("text", "multimodal")[n % 2]} for n in range(1, 41)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))


def test_claims_are_judged_by_pairs(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    ablation = read_ablation(FOLDER / "figure8.yaml")
    found = read_results(ablation, graph, size="tiny", cache=tmp_path)
    assert found.values("bits_per_byte", "grouped") == list(BITS["grouped"])
    language, easy, _ = found.claims()
    # The values of the arms overlap, but each pair differs by 0.1, and less is better.
    assert language["difference"]["mean"] == pytest.approx(0.1) and language["verdict"] == "confirmed"
    assert easy["difference"]["mean"] == pytest.approx(0.0) and easy["verdict"] == "too small to tell"
    assert found.tokens == {"grouped": 2000, "mixed": 2000}


def test_page_and_json_hold_the_numbers(graph: Graph, tmp_path: Path) -> None:
    fill(graph, tmp_path)
    found = read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
    cost = cost_of(graph, cache=tmp_path)
    assert cost == {"hours": pytest.approx(len(graph.tasks) * 36 / 3600), "commits": ["abc"]}
    text = "\n".join(page(found, name="figure8", command="COMMAND", cost=COST, simulations={"gain": 0.008}))
    for part in (
        "| **confirmed** |",
        "2.1333 [1.7",
        "1.50 hours",
        "code abc",
        "COMMAND",
        "| gain | +0.8% |",
        "figure8.svg",
    ):
        assert part in text
    plain = json.loads(json.dumps(found.to_dict(simulations={"gain": 0.008})))
    assert plain["arms"]["grouped"]["measures"]["bits_per_byte"]["values"] == list(BITS["grouped"])
    assert plain["curves"]["easy"]["mixed"]["2"] == [[0, 0.25], [10, 0.3]]


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
    (run / "evaluation.jsonl").write_text('{"step": 10, "tasks": {"eval": {"accuracy": null}}, "held_out": {}}\n')
    with pytest.raises(DataError, match=r"measures\.bits_per_byte\.key: .* at step 10 of .*arm grouped, seed 1"):
        read_results(read_ablation(FOLDER / "figure8.yaml"), graph, size="tiny", cache=tmp_path)
