"""`megavl plan`: memory and speed of a recipe before it runs, and its fastest layouts."""

from __future__ import annotations

import argparse
import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megavl.config.errors import UsageError
from megavl.config.recipe import Recipe
from megavl.data.mixture import preview
from megavl.files.new_folder import work_folder
from megavl.foreign.printing import say
from megavl.main.open_recipe import add_recipe_arguments, open_on_one_device, open_recipe
from megavl.planner.hardware.calibration import (
    check_calibration,
    check_device,
    merge,
    read_calibration,
    write_calibration,
)
from megavl.planner.hardware.devices import DEVICES, Device
from megavl.planner.layouts.check import check_memory, checked_scenario
from megavl.planner.layouts.layout import layout_of
from megavl.planner.layouts.search import Ranking, search
from megavl.planner.plan import Plan, plan_scenario, to_json
from megavl.planner.report.text import render, render_mixing, render_ranking
from megavl.planner.report.timeline import write_timeline
from megavl.planner.scenario import (
    PLACEMENTS,
    Scenario,
    check_images,
    checked_devices,
    expected_images,
    make_scenario,
)
from megavl.planner.simulation.measured import MeasuredTimes
from megavl.planner.simulation.mixing import Mixing, compare_mixing
from megavl.planner.simulation.times import DeviceTimes, TimeSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--devices",
        type=int,
        help="number of devices, for which layouts are also ranked (default: one model replica, no ranking); with "
        "parallel: auto it is required, and the fastest layout is planned",
    )
    parser.add_argument(
        "--device", choices=sorted(DEVICES), default="h200", help="kind of device (default: %(default)s)"
    )
    parser.add_argument("--images", type=float, help="images in a multimodal sequence (default: 5, or what fits)")
    parser.add_argument("--calibration", metavar="FILE", help="take seconds from this file of measurements")
    parser.add_argument("--top", type=int, default=10, help="layouts to list (default: %(default)s; 0: no ranking)")
    parser.add_argument(
        "--placements",
        nargs="+",
        choices=PLACEMENTS,
        default=PLACEMENTS,
        help="values of parallel.vision that the ranking tries (default: all)",
    )
    parser.add_argument("--mixing", action="store_true", help="also simulate steps of randomly mixed modalities")
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        help="write a simulated step: .svg, or .json for Perfetto",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="measure every block of the recipe on this device and add the seconds to FILE; on a CPU, run it under "
        "torchrun with each number of processes that will compute at once",
    )
    parser.add_argument("--repeats", type=int, default=20, help="measured steps of --calibrate (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the plan, or measure; returns 0.

    Raises:
        UsageError: the recipe cannot run with this layout. If only memory is missing, the plan is printed before.
    """
    device = DEVICES[args.device]
    alone = open_on_one_device(args.recipe, overrides=args.overrides)
    if args.calibrate:
        recipe = alone or open_recipe(args.recipe, overrides=args.overrides, device=device)
        return _calibrate(recipe, args)
    if alone is None:
        recipe = open_recipe(args.recipe, overrides=args.overrides, devices=args.devices, device=device)
        source = _times(recipe, device, args)
        scenario = checked_scenario(recipe, devices=args.devices, device=device, images=args.images)
        layout = layout_of(scenario, source, memory_bytes=device.usable_bytes)
        ranking = _ranking(scenario, source, device, args) if args.devices is not None and args.top > 0 else None
    else:
        source = _times(alone, device, args)
        scenario, layout, ranking = _best(alone, source, device, args)
    plan = plan_scenario(scenario, layout, source, device)
    drawn = max(_MIXED_STEPS, _MIXED_PIPELINES // scenario.data_parallel)
    mixing = compare_mixing(scenario, layout, source, steps=drawn) if args.mixing else None
    if args.timeline:
        write_timeline(args.timeline, scenario, layout, source)
    show = _as_json if args.json else _as_text
    say(*show(plan, scenario, ranking, mixing).splitlines())
    check_memory(scenario, layout, device)
    return 0


def _best(
    recipe: Recipe, source: TimeSource, device: Device, args: argparse.Namespace
) -> tuple[Scenario, tuple[int, ...], Ranking]:
    """The fastest layout of a recipe that says `parallel: auto`, and the ranking.

    Raises:
        UsageError: the number of devices is missing, or no layout works on them.
    """
    if args.devices is None:
        raise UsageError(f"--devices: {args.recipe} says parallel: auto; name the number of devices to plan for")
    scenario = make_scenario(recipe, devices=1, images=args.images)
    scenario = dataclasses.replace(scenario, devices=checked_devices(args.devices))
    ranking = _ranking(scenario, source, device, args)
    if not ranking.best:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(ranking.rejected.items()))
        raise UsageError(
            f"parallel: auto: none of {ranking.tried} layouts works on {args.devices} x {device.name}: {reasons}; use "
            "more devices or change training.global_batch_size"
        )
    found = ranking.best[0]
    chosen = found.choice.apply(recipe, layout=found.layout)
    return dataclasses.replace(scenario, recipe=chosen), found.layout, ranking


def _ranking(scenario: Scenario, source: TimeSource, device: Device, args: argparse.Namespace) -> Ranking:
    return search(scenario, source, device, top=max(1, args.top), placements=tuple(args.placements))


def _as_text(plan: Plan, scenario: Scenario, ranking: Ranking | None, mixing: Mixing | None) -> str:
    """The plan, the samples of each data source, and the tables that options ask for."""
    parts = [render(plan), "\n".join(preview(scenario.recipe))]
    if mixing is not None:
        parts.append(render_mixing(mixing))
    if ranking is not None:
        parts.append(render_ranking(ranking, scenario))
    return "\n\n".join(parts)


_MIXED_STEPS, _MIXED_PIPELINES = 8, 256
"""Fewest mixed steps that are drawn, and fewest replicas over all of them: few replicas need more steps."""


def _times(recipe: Recipe, device: Device, args: argparse.Namespace) -> TimeSource:
    if args.calibration is None:
        return DeviceTimes(device=device)
    found = read_calibration(args.calibration)
    check_calibration(found, recipe, path=args.calibration)
    check_device(found, device, path=args.calibration)
    return MeasuredTimes(calibration=found, device=device, path=args.calibration)


def _as_json(plan: Plan, scenario: Scenario, ranking: Ranking | None, mixing: Mixing | None) -> str:
    """The plan, and what options ask for; null without the option."""
    more: dict[str, Any] = {"ranking": None, "mixing": None}
    if ranking is not None:
        best = [{**dataclasses.asdict(found), "yaml": found.yaml} for found in ranking.best]
        more["ranking"] = {**dataclasses.asdict(ranking), "best": best}
    if mixing is not None:
        gains = {"gain": mixing.gain, "lockstep_gain": mixing.lockstep_gain}
        more["mixing"] = {**dataclasses.asdict(mixing), **gains}
    return to_json(plan, **more)


def _calibrate(recipe: Recipe, args: argparse.Namespace) -> int:
    """Measure on the processes of the launcher and add the entry to the file."""
    if args.repeats < 2:
        raise UsageError(f"--repeats: {args.repeats} measured steps say nothing; give 2 or more")
    if args.images is not None:
        check_images(recipe, args.images)
    world, tensor = os.environ.get("WORLD_SIZE", "1"), recipe.parallel.tensor
    # A value that is no number is refused when the process group starts.
    if world.isdigit() and int(world) % tensor:
        raise UsageError(
            f"--calibrate: parallel.tensor {tensor} does not divide the number of processes, {world}; start "
            f"`torchrun --nproc-per-node {tensor} -m megavl plan ... --calibrate {args.calibrate}`, or measure with "
            "parallel.tensor=1 parallel.sequence_parallel=false"
        )
    # Checked before measuring, which takes minutes: the folder is writable, nobody else measures into the file, and it
    # belongs to this recipe.
    path = Path(os.path.abspath(args.calibrate))
    writes = os.environ.get("RANK", "0") == "0"
    if writes and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UsageError(f"--calibrate: cannot write {args.calibrate}: its folder is missing or not writable")
    with work_folder(path, name="--calibrate") if writes else nullcontext():
        old = read_calibration(args.calibrate) if path.exists() else None
        if old is not None:
            check_calibration(old, recipe, path=args.calibrate)
        from megavl.train.profile.calibrate import calibrate

        images = expected_images(recipe) if args.images is None else round(args.images)
        new = calibrate(recipe, images=images, repeats=args.repeats)
        if new is not None:
            write_calibration(args.calibrate, merge(old, new, path=args.calibrate))
            entry = new.entries[0]
            say(f"{args.calibrate}: tensor {entry.tensor}, {entry.processes} processes, {new.device}")
    return 0
