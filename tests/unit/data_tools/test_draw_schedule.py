"""The drawing of the modality schedule, also the one in the README of megavl/data."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from data_tools.draw_schedule import describe, main
from megavl.config.load import load_recipe
from megavl.data.plan import ModalityPlan

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "launch/recipes/7b/stage2.yaml"


def description(figure: Path) -> str:
    found = re.search(r"<dc:description>(.*)</dc:description>", figure.read_text())
    assert found
    return found[1]


def test_figure_in_the_readme_shows_the_current_plan() -> None:
    recipe = load_recipe(RECIPE)
    data = recipe.data
    plan = ModalityPlan(
        seed=recipe.training.seed, fraction=data.multimodal_fraction, warmup_steps=data.modality_warmup_steps
    )
    assert description(ROOT / "megavl/data/schedule.svg") == describe(plan, steps=6000)


def test_command_draws_the_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "x.svg"
    assert main([str(RECIPE), "data.multimodal_fraction=0.5", "--steps", "300", "--output", str(output)]) == 0
    assert "target 0.5 multimodal" in description(output) and str(output) in capsys.readouterr().out
    assert main([str(RECIPE), "--steps", "300", "--output", str(tmp_path / "x.docx")]) == 2
    assert main([str(RECIPE), "--steps", "300", "--output", str(tmp_path / "none/x.svg")]) == 5
    assert capsys.readouterr().err.count("error: --output") == 2


def test_mistakes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(RECIPE), "--steps", "100", "--output", str(tmp_path / "x.svg")]) == 2
    assert "--window 100: must be above 0 and below the 100 steps" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(RECIPE), "--output", str(tmp_path / "x.svg")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
