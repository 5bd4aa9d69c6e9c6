"""`megavl plan`: what a recipe will take, before it runs."""

from __future__ import annotations

import argparse

from megavl.config.load import load_recipe
from megavl.data.mixture import preview
from megavl.planner.devices import DEVICES
from megavl.planner.plan import DEFAULT_EFFICIENCY, plan_recipe, render, to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, YAML")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="values laid over the recipe")
    parser.add_argument("--devices", type=int, help="number of devices; default: parallel.tensor x parallel.pipeline")
    parser.add_argument(
        "--device", choices=sorted(DEVICES), default="h200", help="kind of device (default: %(default)s)"
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        default=DEFAULT_EFFICIENCY,
        help="assumed share of the peak that a busy device reaches, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0."""
    recipe = load_recipe(args.recipe, overrides=args.overrides)
    smallest = recipe.parallel.tensor * recipe.parallel.pipeline
    devices = smallest if args.devices is None else args.devices
    plan = plan_recipe(recipe, devices=devices, device=args.device, efficiency=args.efficiency)
    print(to_json(plan) if args.json else "\n".join([render(plan), "", *preview(recipe)]))
    return 0
