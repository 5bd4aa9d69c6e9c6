"""A recipe on the command line; if its layout cannot work, the error message names the nearest one that does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from megavl.checkpoint.find import stored_model
from megavl.config.errors import UsageError
from megavl.config.key_list import key_lines
from megavl.config.load import load_recipe, read_raw
from megavl.config.recipe import Recipe
from megavl.foreign.printing import say
from megavl.planner.hardware.devices import Device
from megavl.planner.layouts.check import nearest_text, wanted_choice

_ONE_DEVICE = (
    *("parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.layout=auto"),
    *("parallel.sequence_parallel=false", "parallel.vision=recompute"),
)


class _ListKeys(argparse.Action):
    """Like `--help`: prints, and ends the command without its other arguments."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        say(*"\n".join(key_lines()).splitlines())
        parser.exit()


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """`RECIPE`, `key.path=value` and `--keys`."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of one stage, e.g. launch/recipes/7b/stage2.yaml")
    parser.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        default=[],
        help="replaces a value of the recipe; --keys lists the keys",
    )
    parser.add_argument(
        "--keys", action=_ListKeys, nargs=0, help="list the keys of a recipe and their defaults, and exit"
    )


def open_on_one_device(path: str, *, overrides: Sequence[str] = ()) -> Recipe | None:
    """A recipe that says `parallel: auto`, on one device; None if it states its layout.

    Raises:
        UsageError: as `load_recipe`.
        CheckpointError: `model: {from: init}` names no valid checkpoint.
    """
    if read_raw(path, overrides=overrides).get("parallel") != "auto":
        return None
    return load_recipe(path, overrides=[*overrides, *_ONE_DEVICE], stored_model=stored_model)


def open_recipe(
    path: str, *, overrides: Sequence[str] = (), devices: int | None = None, device: Device | None = None
) -> Recipe:
    """Load and check.

    Args:
        devices: world size; default: what the recipe asks for.
        device: kind of device; a suggested layout then fits its memory.

    Raises:
        UsageError: as `load_recipe`; for a layout that cannot work, with the nearest one that does.
        CheckpointError: `model: {from: init}` names no valid checkpoint.
    """
    try:
        return load_recipe(path, overrides=overrides, stored_model=stored_model)
    except UsageError as error:
        if "parallel." not in str(error):
            raise
        try:
            alone = load_recipe(path, overrides=[*overrides, *_ONE_DEVICE], stored_model=stored_model)
        except UsageError:
            raise error from None
        wanted = wanted_choice(read_raw(path, overrides=overrides))
        world = wanted.tensor * wanted.pipeline if devices is None else devices
        raise UsageError(f"{error}{nearest_text(alone, wanted, devices=world, device=device)}") from None
