"""The shipped recipes take layouts that the planner would choose for the launch scripts' nodes of eight H100."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megavl.config.load import load_recipe
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.layouts.check import checked_layout, checked_scenario
from megavl.planner.layouts.search import search
from megavl.planner.plan import plan_scenario
from megavl.planner.scenario import Scenario
from megavl.planner.simulation.predict import expected_seconds
from megavl.planner.simulation.times import DeviceTimes

LAUNCH = Path(__file__).resolve().parents[4] / "launch"
DEVICE = DEVICES["h100"]
SLOWER = 1.05
"""Time of a shipped recipe's step over that of the best layout."""
CALL = re.compile(r"^launch \w+ (\S+\.yaml) (\d+)$", re.MULTILINE)
DEFAULTS = sorted(
    (recipe, DEVICE.per_node * int(nodes))
    for script in LAUNCH.glob("*_*b.sh")
    for recipe, nodes in CALL.findall(script.read_text(encoding="utf-8"))
)


def scenario_of(recipe: str, *, devices: int) -> Scenario:
    return checked_scenario(load_recipe(LAUNCH / "recipes" / recipe), devices=devices, device=DEVICE)


def seconds_of(scenario: Scenario) -> float:
    layers = checked_layout(scenario, DEVICE)
    assert layers is not None
    return expected_seconds(scenario, layers, DeviceTimes(device=DEVICE))


def test_every_launch_script_names_its_default() -> None:
    assert [recipe for recipe, _ in DEFAULTS] == [f"{m}/stage{s}.yaml" for m in ("1b", "7b") for s in (1, 2, 3)]


@pytest.mark.parametrize(("recipe", "devices"), DEFAULTS)
def test_no_layout_is_much_faster(recipe: str, devices: int) -> None:
    scenario = scenario_of(recipe, devices=devices)
    best = search(scenario, DeviceTimes(device=DEVICE), DEVICE, top=1).best[0]
    assert seconds_of(scenario) <= SLOWER * best.seconds, f"the planner would take\n{best.yaml}"


def test_paper_layout_is_found_to_be_slower() -> None:
    paper, shipped = (scenario_of(f"7b/stage2{name}.yaml", devices=512) for name in ("_paper", ""))
    assert (paper.recipe.parallel.tensor, paper.recipe.parallel.pipeline) == (4, 4)
    assert seconds_of(paper) > SLOWER * seconds_of(shipped)
    assert paper.recipe.data == shipped.recipe.data and paper.recipe.optimizer == shipped.recipe.optimizer


def test_7b_reaches_its_share_of_the_peak() -> None:
    scenario = scenario_of("7b/stage2.yaml", devices=512)
    plan = plan_scenario(scenario, checked_layout(scenario, DEVICE), DeviceTimes(device=DEVICE), DEVICE)
    assert plan.expected.mfu is not None and plan.expected.mfu >= 0.48
