"""Calibration files are read, merged or refused, and their seconds become a prediction."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from megavl.config.errors import UsageError
from megavl.planner.hardware.calibration import (
    Calibration,
    Entry,
    KindEntry,
    Seconds,
    VisionEntry,
    check_calibration,
    check_device,
    merge,
    model_key,
    read_calibration,
    recompute_key,
    write_calibration,
)
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.layouts.search import search
from megavl.planner.scenario import make_scenario
from megavl.planner.simulation.measured import MeasuredTimes
from megavl.planner.simulation.predict import step_time
from megavl.planner.simulation.times import Pass
from tests.unit.planner.recipes import recipe_of

RECIPE = recipe_of("tiny-hybrid", precision="fp32", fraction=0.5, batch=8, pipeline=2)


def kind(scale: float) -> KindEntry:
    return KindEntry(
        embedding=Seconds(forward=0.1 * scale, backward=0.2 * scale),
        layer=Seconds(forward=1.0 * scale, backward=2.0 * scale),
        head=Seconds(forward=0.5 * scale, backward=1.0 * scale),
        loading=0.01,
    )


def vision(images: float) -> VisionEntry:
    return VisionEntry(
        towers=Seconds(forward=1.0 + 0.5 * images, backward=0.0),
        adaptor=Seconds(forward=0.25 * images, backward=0.5 * images),
    )


def entry(processes: int, *, slow: float = 1.0, tensor: int = 1) -> Entry:
    return Entry(
        tensor=tensor,
        processes=processes,
        sequence_parallel=False,
        micro_batch_size=1,
        recompute="none",
        text=kind(slow),
        multimodal=kind(slow),
        images=8.0,
        vision=vision(8),
        one_image=vision(1),
        update_s_per_parameter=1e-9,
        step_s=0.05,
        transfer_s=0.02 if processes > 1 else None,
    )


def calibration(*entries: Entry, shared: bool = True) -> Calibration:
    return Calibration(
        device="a machine",
        shared_cores=shared,
        model=model_key(RECIPE.model),
        seq_length=512,
        precision="fp32",
        trained=RECIPE.trainable_parts,
        data="recipe",
        versions={"torch": "2"},
        entries=entries,
    )


def times(*entries: Entry, shared: bool = True) -> MeasuredTimes:
    return MeasuredTimes(calibration=calibration(*entries, shared=shared), device=DEVICES["cpu"], path="c.json")


def test_a_file_reads_back(tmp_path: Path) -> None:
    written = calibration(entry(1), entry(2, slow=1.5))
    write_calibration(tmp_path / "c.json", written)
    assert read_calibration(tmp_path / "c.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the file: Invalid JSON"), ("{}", "Field required|Missing required"), ('{"entries": 3}', "c.json")],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_calibration(tmp_path / "c.json")


def test_a_missing_file_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_calibration(tmp_path / "none.json")
    raw = {**dataclasses.asdict(calibration(entry(1))), "format": 99}
    (tmp_path / "c.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="format 99"):
        read_calibration(tmp_path / "c.json")


def test_merging_replaces_what_was_measured_again(tmp_path: Path) -> None:
    old = calibration(entry(1), entry(2))
    new = merge(old, calibration(entry(2, slow=3.0)), path="c.json")
    assert [(e.processes, e.text.layer.forward) for e in new.entries] == [(1, 1.0), (2, 3.0)]
    assert merge(None, old, path="c.json") == old
    with pytest.raises(UsageError, match="measurements of device 'a machine'"):
        merge(old, dataclasses.replace(old, device="another"), path="c.json")


def test_a_file_of_something_else_is_refused() -> None:
    check_calibration(calibration(entry(1)), RECIPE, path="c.json")
    deeper = recipe_of("tiny-hybrid", precision="fp32", fraction=0.5, layers=9)
    check_calibration(calibration(entry(1)), deeper, path="c.json")
    for other in (recipe_of("tiny-siglip", precision="fp32"), recipe_of("tiny-hybrid"), recipe_of("7b")):
        with pytest.raises(UsageError, match="was measured for"):
            check_calibration(calibration(entry(1)), other, path="c.json")


@pytest.mark.parametrize(
    ("measured", "named", "fits"),
    [
        ("x86_64 CPU, 2 cores, 1 threads a rank", "cpu", True),
        ("x86_64 CPU, 2 cores, 1 threads a rank", "h200", False),
        ("NVIDIA H200", "h200", True),
        ("NVIDIA H200", "h100", False),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie", True),
        ("NVIDIA A100-PCIE-40GB", "a100", False),
        ("NVIDIA A100-SXM4-80GB", "a100", True),
        # Without a row of its own another one's links and memory are taken.
        ("NVIDIA L40S", "a100-pcie", True),
        ("NVIDIA GH200 480GB", "h100", True),
    ],
)
def test_a_file_of_another_device_is_refused(measured: str, named: str, fits: bool) -> None:
    file = dataclasses.replace(calibration(entry(1)), device=measured)
    with contextlib.nullcontext() if fits else pytest.raises(UsageError, match=f"--device is {named}"):
        check_device(file, DEVICES[named], path="c.json")


def test_recompute_has_a_key() -> None:
    assert recompute_key(RECIPE) == "none"


def test_measured_blocks_are_used_and_images_interpolated() -> None:
    scenario = make_scenario(RECIPE, images=4)
    found = times(entry(1), entry(2)).blocks(scenario, "multimodal")
    assert found.layer == Pass(1.0, 2.0)
    assert found.vision.forward == pytest.approx(1.0 + 0.5 * 4 + 0.25 * 4)
    assert found.vision.backward == pytest.approx(0.5 * 4)
    assert times(entry(1), entry(2)).blocks(scenario, "text").vision == Pass()


def test_step_time_is_the_sum_of_measurements() -> None:
    """One rank: no schedule and no dummy image, so micro-batches x blocks, update, fixed costs and loading."""
    recipe = recipe_of("tiny-hybrid", precision="fp32", fraction=0.5, batch=8)
    found = step_time(make_scenario(recipe, images=8), (4,), times(entry(1)), "text")
    assert found.pipeline_s == pytest.approx(8 * (0.3 + 4 * 3.0 + 1.5))
    assert found.extras.loading == pytest.approx(0.05 + 8 * 0.01)
    assert found.extras.dummy_image == 0
    two = dataclasses.replace(recipe.parallel, overlap_grad_reduce=True)
    replicas = make_scenario(dataclasses.replace(recipe, parallel=two), images=8, devices=2)
    assert step_time(replicas, (4,), times(entry(1), entry(2)), "text").extras.dummy_image == pytest.approx(2.25)


def test_ranks_that_share_cores_slow_each_other_down() -> None:
    scenario = make_scenario(RECIPE, images=8)
    crowded = times(entry(1), entry(2, slow=2.0))
    assert crowded.slowdown(scenario) == pytest.approx((1.0, 2.0))
    assert crowded.transfer(scenario) == 0.02
    alone = times(entry(1), entry(2, slow=2.0), shared=False)
    assert alone.slowdown(scenario) == (1.0,)
    slow = step_time(scenario, (2, 2), crowded, "text").pipeline_s
    assert slow > 1.5 * step_time(scenario, (2, 2), alone, "text").pipeline_s * 0.5


def test_missing_measurements_name_their_command() -> None:
    with pytest.raises(UsageError, match="with 2 processes.*torchrun --nproc-per-node 2 .*--calibrate c.json"):
        times(entry(1)).slowdown(make_scenario(RECIPE))
    with pytest.raises(UsageError, match="tensor 2"):
        times(entry(1)).blocks(make_scenario(recipe_of("tiny-hybrid", tensor=2, precision="fp32")), "text")


def test_a_search_tries_only_what_was_measured() -> None:
    device = DEVICES["cpu"]
    source = times(entry(1), entry(2))
    recipe = recipe_of("tiny-hybrid", precision="fp32", fraction=0.5, batch=8)
    found = search(make_scenario(recipe, devices=2), source, device)
    sizes = {(item.choice.tensor, item.choice.pipeline, item.choice.micro_batch_size) for item in found.best}
    assert sizes == {(1, 1, 1), (1, 2, 1)}
    assert found.rejected["not in the calibration"] > 0
