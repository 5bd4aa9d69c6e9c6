"""Pictures and traces of simulated steps, and the comparison with mixed steps."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from megavl.config.errors import UsageError
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.report.svg import COLOURS, draw
from megavl.planner.report.timeline import panel, title, write_timeline
from megavl.planner.scenario import make_scenario
from megavl.planner.simulation.mixing import compare_mixing
from megavl.planner.simulation.predict import step_time
from megavl.planner.simulation.times import DeviceTimes, FlatTimes
from tests.unit.planner.recipes import recipe_of

SVG = "{http://www.w3.org/2000/svg}"
SOURCE = DeviceTimes(device=DEVICES["a100"])
SIZES = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "batch": 16}
LAYOUT = (6, 8, 8, 8)


def test_a_panel_holds_every_pass_once() -> None:
    scenario = make_scenario(recipe_of(**SIZES), devices=8)
    found = panel(scenario, LAYOUT, SOURCE, "multimodal")
    counts = Counter((part.what, part.stage) for part in found.segments if part.micro_batch is not None)
    for stage in range(4):
        assert counts["decoder forward", stage] == counts["decoder backward", stage] == scenario.micro_batches
    assert counts["encoders forward", 0] == counts["head backward", 3] == scenario.micro_batches
    assert not counts["encoders forward", 1]
    assert found.seconds == pytest.approx(step_time(scenario, LAYOUT, SOURCE, "multimodal").seconds)
    for rank in range(2):
        computing = [p for p in found.segments if p.rank == rank and p.micro_batch is not None]
        ordered = sorted(computing, key=lambda part: part.start)
        assert all(a.end <= b.start + 1e-9 for a, b in zip(ordered, ordered[1:])), "no two passes at once"
        busy = sum(part.end - part.start for part in computing)
        assert busy == pytest.approx(found.busy[rank] * step_time(scenario, LAYOUT, SOURCE, "multimodal").pipeline_s)


def test_split_all_encoders_appear_on_every_rank() -> None:
    scenario = make_scenario(recipe_of(vision="split_all", **SIZES), devices=8)
    found = panel(scenario, LAYOUT, SOURCE, "multimodal")
    before = [part for part in found.segments if part.what == "encoders forward" and part.micro_batch is None]
    assert {part.rank for part in before} == {0, 1}
    pipeline = min(part.start for part in found.segments if part.what == "decoder forward")
    assert all(part.end <= pipeline for part in before)


def test_a_shortened_step_encodes_less_ahead() -> None:
    scenario = make_scenario(recipe_of(vision="split_all", **SIZES), devices=4)
    ahead = [
        next(part.end for part in panel(scenario, LAYOUT, SOURCE, "multimodal", most=most).segments if part.start == 0)
        for most in (4, 16)
    ]
    assert ahead[0] == pytest.approx(ahead[1] / 4, rel=0.01)


def test_svg_has_rows_of_ranks_and_boxes(tmp_path: Path) -> None:
    scenario = make_scenario(recipe_of(**SIZES), devices=8)
    write_timeline(tmp_path / "step.svg", scenario, LAYOUT, SOURCE)
    root = ElementTree.parse(tmp_path / "step.svg").getroot()
    assert root.tag == f"{SVG}svg"
    panels = [panel(scenario, LAYOUT, SOURCE, kind, most=8) for kind in ("text", "multimodal")]
    tips = [box.findtext(f"{SVG}title") for box in root.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    assert len(tips) == sum(len(part.segments) for part in panels)
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    used = {segment.what for part in panels for segment in part.segments}
    assert used | {"idle"} <= set(texts), "the legend names every colour"
    assert sum(text.startswith("rank ") for text in texts) == 4
    assert any(text.startswith("multimodal step: ") and "bubble" in text for text in texts)
    assert title(scenario, LAYOUT, SOURCE.name) in texts
    right = max(float(box.get("x", 0)) + float(box.get("width", 0)) for box in root.iter(f"{SVG}rect"))
    assert right <= float(root.get("width", 0)) + 1e-6


def test_a_title_is_escaped() -> None:
    found = panel(make_scenario(recipe_of(**SIZES), devices=8), LAYOUT, SOURCE, "text", most=2)
    assert ElementTree.fromstring(draw([found], title="a < b & c")) is not None


def test_every_segment_has_a_colour() -> None:
    scenario = make_scenario(recipe_of(vision="split_all", stage=3, **SIZES), devices=8)
    for kind in ("text", "multimodal"):
        assert {part.what for part in panel(scenario, LAYOUT, SOURCE, kind).segments} <= set(COLOURS)


def test_trace_has_fields_of_trace_event_format(tmp_path: Path) -> None:
    scenario = make_scenario(recipe_of(**SIZES), devices=8)
    write_timeline(tmp_path / "step.json", scenario, LAYOUT, SOURCE)
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    names = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in events:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["name"]
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            assert (event["pid"], event["tid"]) in names
    decoder = [event for event in events if event.get("cat") == "decoder forward" and event["pid"] == 0]
    assert len(decoder) == scenario.micro_batches * 4


@pytest.mark.parametrize(("name", "message"), [("step.png", "ends in .png"), ("no/such/place.svg", "cannot write")])
def test_a_wrong_place_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_timeline(tmp_path / name, make_scenario(recipe_of(**SIZES)), LAYOUT, SOURCE)


def test_mixing_costs_nothing_when_modalities_cost_the_same() -> None:
    scenario = dataclasses.replace(make_scenario(recipe_of(train=("llm",), **SIZES), devices=16), images=0.0)
    found = compare_mixing(scenario, LAYOUT, FlatTimes(), steps=2)
    assert found.gain == pytest.approx(0.0)


def test_mixing_equals_grouping_for_one_modality() -> None:
    scenario = make_scenario(recipe_of(fraction=1.0, **SIZES), devices=16)
    assert compare_mixing(scenario, LAYOUT, SOURCE, steps=1).gain == pytest.approx(0.0)


def test_mixed_steps_wait_for_the_slowest_replica() -> None:
    """With more replicas the slowest takes longer; grouped steps do not depend on their number."""
    few, many = (
        compare_mixing(
            make_scenario(recipe_of(fraction=0.5, tensor=2, batch=8 * n), devices=2 * n), (30,), SOURCE, steps=8
        )
        for n in (1, 16)
    )
    assert (few.replicas, many.replicas) == (1, 16)
    assert few.gain < many.gain
    assert abs(few.gain) < 0.02 < many.gain < many.lockstep_gain
    assert few.lockstep_gain == few.gain
