"""The ranking against brute force in small spaces, reasons for rejection, and the nearest layout that works."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from megavl.config.errors import UsageError
from megavl.config.load import dump_recipe, load_recipe
from megavl.config.recipe import Recipe
from megavl.planner.cost.memory import fullest_rank
from megavl.planner.hardware.devices import DEVICES, Device
from megavl.planner.layouts.balance import every_layout
from megavl.planner.layouts.check import checked_layout, checked_scenario, distance, nearest
from megavl.planner.layouts.search import Choice, choices, recomputes, scenario_with, search
from megavl.planner.scenario import make_scenario
from megavl.planner.simulation.predict import expected_seconds
from megavl.planner.simulation.times import DeviceTimes
from tests.unit.planner.recipes import recipe_of


def small(memory: int | None = None) -> Device:
    """A fast device with little memory and two devices a node."""
    return dataclasses.replace(DEVICES["a100"], memory_bytes=memory, per_node=2)


@pytest.mark.parametrize(
    ("stage", "limit"), [(1, None), (2, None), (3, None), (2, 10_000_000_000), (3, 8_000_000_000), (2, 10**9)]
)
def test_search_finds_the_optimum_of_brute_force(stage: int, limit: int | None) -> None:
    """Brute force over every choice and every split of a model with four layers."""
    device = small(limit)
    recipe = recipe_of("1b", stage=stage, layers=4, batch=4)
    scenario, source = make_scenario(recipe, devices=2), DeviceTimes(device=device)
    best = math.inf
    for choice in choices(scenario, per_node=2, virtual=(1, 2)):
        candidate = scenario_with(scenario, choice)
        for layout in every_layout(4, candidate.stages):
            if device.usable_bytes is None or fullest_rank(candidate, layout)[1].total <= device.usable_bytes:
                best = min(best, expected_seconds(candidate, layout, source))
    found = search(scenario, source, device, virtual=(1, 2))
    if not found.best:
        assert best == math.inf
        return
    assert found.best[0].seconds == pytest.approx(best, rel=2e-3)


def test_the_list_is_sorted_distinct_and_fits() -> None:
    device = DEVICES["a100"]
    scenario = make_scenario(recipe_of(batch=64), devices=16)
    found = search(scenario, DeviceTimes(device=device), device, top=8)
    assert len(found.best) == 8
    assert [item.seconds for item in found.best] == sorted(item.seconds for item in found.best)
    sizes = [(item.choice.tensor, item.choice.pipeline, item.choice.virtual) for item in found.best]
    assert len(set(sizes)) == 8
    assert all(item.memory <= (device.usable_bytes or 0) for item in found.best)
    assert found.tried > found.slower + sum(found.rejected.values())


def test_rejected_candidates_have_a_reason() -> None:
    device = DEVICES["a100"]
    scenario = make_scenario(recipe_of(batch=12), devices=12)
    tight = dataclasses.replace(device, memory_bytes=6 * 10**9)
    found = search(scenario, DeviceTimes(device=tight), tight)
    assert "tensor ranks do not divide model.llm.num_attention_heads" in found.rejected
    assert "the global batch is no multiple of data-parallel ranks x micro-batch" in found.rejected
    assert "too little memory, even with full recompute" in found.rejected


def test_recompute_is_chosen_only_to_fit_memory() -> None:
    scenario = make_scenario(recipe_of(batch=64, fraction=0.0), devices=8)
    wide, tight = DEVICES["h200"], dataclasses.replace(DEVICES["h200"], memory_bytes=20 * 10**9)
    assert search(scenario, DeviceTimes(device=wide), wide, top=1).best[0].choice.recompute.granularity == "none"
    found = search(scenario, DeviceTimes(device=tight), tight, top=4).best
    assert found
    assert any(item.choice.recompute.granularity != "none" for item in found)


def test_choices_are_the_product_of_what_fits() -> None:
    recipe = recipe_of(batch=8)
    rejected: Counter[str] = Counter()
    found = list(choices(make_scenario(recipe, devices=2), per_node=8, rejected=rejected))
    assert len(found) == len(set(found))
    for choice in found:
        assert make_scenario(choice.apply(recipe), devices=2).devices == 2
    assert {(c.tensor, c.pipeline) for c in found} == {(1, 1), (1, 2), (2, 1)}
    assert {c.virtual for c in found if c.pipeline == 1} == {1}
    assert {c.vision for c in found if (c.tensor, c.pipeline) == (2, 1)} == {"recompute", "split_tp"}
    assert {c.vision for c in found if (c.tensor, c.pipeline) == (1, 2)} == {"recompute", "split_all"}
    assert not {c.vision for c in choices(make_scenario(recipe_of(fraction=0.0)), per_node=8)} - {"recompute"}
    assert {c.recompute for c in found} == set(recomputes(recipe))


def test_pasted_lines_give_the_ranked_recipe(tmp_path: Path) -> None:
    device = DEVICES["a100"]
    recipe = recipe_of(stage=3, batch=64, tensor=8, sequence_parallel=True)
    scenario = make_scenario(recipe, devices=8)
    for item in search(scenario, DeviceTimes(device=device), device, top=5).best:
        raw = yaml.safe_load(dump_recipe(recipe))
        for section, entries in yaml.safe_load(item.yaml).items():
            raw[section] = {**raw[section], **entries}
        (tmp_path / "pasted.yaml").write_text(yaml.safe_dump(raw))
        pasted = load_recipe(tmp_path / "pasted.yaml")
        assert pasted.parallel.layout == item.layout
        assert dataclasses.replace(pasted.parallel, layout="auto") == item.choice.apply(recipe).parallel
        assert pasted.recompute == item.choice.recompute
        assert pasted.training.micro_batch_size == item.choice.micro_batch_size


def layout_for(recipe: Recipe, *, devices: int, device: Device | None) -> tuple[int, ...]:
    """The layout that training takes; raises if it is refused."""
    return checked_layout(checked_scenario(recipe, devices=devices, device=device), device)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"tensor": 4, "pipeline": 4, "batch": 64}, 17, "no multiple of parallel.tensor 4 x parallel.pipeline 4"),
        ({"batch": 10}, 4, "training.global_batch_size: 10 is no multiple"),
        ({"pipeline": 4, "virtual_pipeline": 2, "batch": 6}, 4, "parallel.virtual_pipeline"),
        ({"batch": 8}, 8, "pipeline rank 0 needs"),
    ],
)
def test_impossible_layouts_name_the_nearest_working_one(changes: dict[str, Any], devices: int, message: str) -> None:
    device = dataclasses.replace(DEVICES["a100"], memory_bytes=40 * 10**9)
    with pytest.raises(UsageError, match=message) as caught:
        layout_for(recipe_of(**changes), devices=devices, device=device)
    assert "nearest that works" in str(caught.value) or "no layout of this recipe works" in str(caught.value)


def test_the_nearest_layout_works() -> None:
    recipe = recipe_of(batch=64)
    wanted = dataclasses.replace(Choice.of(recipe), tensor=3, pipeline=4)
    found = nearest(recipe, wanted, devices=16, device=DEVICES["a100"])
    assert found is not None
    choice, layout = found
    assert (choice.tensor, choice.pipeline) == (4, 4)
    candidate = scenario_with(make_scenario(recipe, devices=16), choice)
    assert fullest_rank(candidate, layout)[1].total <= (DEVICES["a100"].usable_bytes or 0)
    layout_for(candidate.recipe, devices=16, device=DEVICES["a100"])
    distances = [distance(wanted, other) for other in choices(make_scenario(recipe, devices=16), per_node=8)]
    assert distance(wanted, choice) == min(distances)


def test_without_a_known_device_memory_is_not_checked() -> None:
    layout_for(recipe_of(micro=8), devices=1, device=None)
    layout_for(recipe_of(micro=8, precision="fp32"), devices=1, device=DEVICES["cpu"])


def test_no_layout_at_all() -> None:
    tiny = dataclasses.replace(DEVICES["a100"], memory_bytes=10**8)
    with pytest.raises(UsageError, match="no layout of this recipe works on 2 devices"):
        layout_for(recipe_of(batch=8), devices=2, device=tiny)
