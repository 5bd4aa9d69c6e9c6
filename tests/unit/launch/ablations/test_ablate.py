"""The command: what it reports where a part fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import ablate
from launch.ablations import simulations
from launch.ablations.definition import read_ablation
from launch.ablations.graph import build_graph
from launch.ablations.runner import TaskFailed
from launch.ablations.simulations import simulate
from megavl.config.errors import UsageError
from tests.unit.launch.ablations.test_definition import FOLDER, SIMULATION, arms_with, write
from tests.unit.launch.ablations.test_results import fill


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    monkeypatch.setattr(ablate.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ablate, "draw", lambda _: b"<svg/>")


class Failing:
    """A queue in which some task fails."""

    def __init__(self, **_: Any) -> None:
        pass

    def run(self) -> None:
        raise TaskFailed("x ended with code 3", code=3)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command for figures 8 and 9 with three seeds; the runs of figure 8 are done."""
    graph = build_graph(read_ablation(FOLDER / "figure8.yaml"), size="tiny", seeds=3)
    fill(graph, tmp_path / "cache")
    files = [str(FOLDER / f"{name}.yaml") for name in ("figure9", "figure8")]
    return [*files, "--seeds", "3", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]


def test_failed_ablation_leaves_other_reports(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablate, "Runner", Failing)
    monkeypatch.setattr(ablate, "simulate", lambda *_, **__: {"gain": 0.25})
    assert ablate.main(words) == 3
    assert "x ended with code 3" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"figure8.{ending}" for ending in ("json", "md", "svg")
    }
    page = (tmp_path / "out/figure8.md").read_text()
    assert "python launch/ablate.py launch/ablations/figure8.yaml --size tiny --seeds 3" in page


def test_failed_simulation_loses_no_result(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "Runner", Failing)
    monkeypatch.setattr(Failing, "run", lambda _: None)
    monkeypatch.setattr(simulations, "run", lambda *_: ("", "code 2"))
    assert ablate.main(words[1:]) == 2
    assert json.loads((tmp_path / "out/figure8.json").read_text())["simulations"] == {}
    assert (tmp_path / "out/figure8.md").is_file()


def test_wrong_simulation_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, simulations=[{**SIMULATION, "set": {"data.multimodal_fracton": 0.6}}])
    assert ablate.main([str(path), "--cache", str(tmp_path / "cache")]) == 2
    assert "simulations: gain: " in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_several_files_are_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(FOLDER / f"{name}.yaml") for name in ("figure8", "figure9")]
    assert ablate.main([*files, "--list", "--seeds", "1"]) == 0
    rows = [line.split(" ", 2) for line in capsys.readouterr().out.splitlines()]
    assert [int(number) for number, _, _ in rows] == list(range(len(rows)))
    assert len({address for _, address, _ in rows}) == len(rows)


def test_answer_is_kept_for_a_recipe_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def answer(*words: str) -> tuple[str, str]:
        asked.append(words)
        return json.dumps({"mixing": {"gain": 0.5}}), ""

    monkeypatch.setattr(simulations, "run", answer)
    recipe = tmp_path / "stage2.yaml"
    recipe.write_text((FOLDER.parents[1] / "launch/recipes/7b/stage2.yaml").read_text())
    ablation = read_ablation(write(tmp_path, simulations=[{**SIMULATION, "recipe": str(recipe)}]))
    for code, rate, count in (
        ("a", "4.2e-5", 1),
        ("a", "4.2e-5", 1),
        ("b", "4.2e-5", 2),
        ("b", "4.1e-5", 3),
        ("b-dirty", "4.1e-5", 4),
        ("b-dirty", "4.1e-5", 5),
    ):
        monkeypatch.setattr(simulations, "commit", lambda code=code: code)
        recipe.write_text(recipe.read_text().replace("lr: 4.2e-5", f"lr: {rate}"))
        assert simulate(ablation, cache=tmp_path) == {"gain": 0.5}
        assert len(asked) == count, (code, rate)


def test_damaged_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "run", lambda *_: (json.dumps({"mixing": {"gain": 0.5}}), ""))
    monkeypatch.setattr(simulations, "commit", lambda: "a")
    ablation = read_ablation(write(tmp_path, simulations=[SIMULATION]))
    for content in ("", "{", "\xff"):
        for path in tmp_path.glob("plan-*.json"):
            path.write_text(content, encoding="latin-1")
        assert simulate(ablation, cache=tmp_path) == {"gain": 0.5}


def test_mistake_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, **arms_with(set={"stage2.data.gruoping": "step"}))
    assert ablate.main([str(FOLDER / "figure9.yaml"), str(path), "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert f"{path}: arms.mixed.set.stage2.data.gruoping: data.gruoping: unknown key" in error
    assert "command line" not in error and "(in mixed, seed 1, stage2)" in error


@pytest.mark.parametrize(
    "words", [["--smoke", "--size", "tiny"], ["--slurm", "--cell", "3"], ["--list", "--cell", "3"]], ids=" ".join
)
def test_options_that_exclude_each_other(words: list[str], tmp_path: Path) -> None:
    command = [str(FOLDER / "figure8.yaml"), "--cache", str(tmp_path / "cache"), *words]
    try:
        assert ablate.main(command) == 2
    except SystemExit as end:
        assert end.code == 2
    assert not (tmp_path / "cache").exists()


def test_refused_plan_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "run", lambda *_: ("", "code 2"))
    ablation = read_ablation(write(tmp_path, simulations=[SIMULATION]))
    with pytest.raises(UsageError, match="simulations: gain: megavl plan .*stage2.yaml failed: code 2"):
        simulate(ablation, cache=tmp_path)
