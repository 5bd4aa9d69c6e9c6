"""Loads a recipe; if its layout cannot work, the error message names the nearest one that does."""

from __future__ import annotations

from collections.abc import Sequence

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe, read_raw
from megavl.config.recipe import Recipe
from megavl.planner.hardware.devices import Device
from megavl.planner.layouts.check import nearest_text, wanted_choice

_ONE_DEVICE = (
    *("parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.layout=auto"),
    *("parallel.sequence_parallel=false", "parallel.vision=recompute"),
)


def open_on_one_device(path: str, *, overrides: Sequence[str] = ()) -> Recipe | None:
    """A recipe that says `parallel: auto`, on one device; None if it states its layout.

    Raises:
        UsageError: as `load_recipe`.
    """
    if read_raw(path, overrides=overrides).get("parallel") != "auto":
        return None
    return load_recipe(path, overrides=[*overrides, *_ONE_DEVICE])


def open_recipe(
    path: str, *, overrides: Sequence[str] = (), devices: int | None = None, device: Device | None = None
) -> Recipe:
    """Load and check.

    Args:
        devices: world size; default: what the recipe asks for.
        device: kind of device; a suggested layout then fits its memory.

    Raises:
        UsageError: as `load_recipe`; for a layout that cannot work, with the nearest one that does.
    """
    try:
        return load_recipe(path, overrides=overrides)
    except UsageError as error:
        if "parallel." not in str(error):
            raise
        try:
            alone = load_recipe(path, overrides=[*overrides, *_ONE_DEVICE])
        except UsageError:
            raise error from None
        wanted = wanted_choice(read_raw(path, overrides=overrides))
        world = wanted.tensor * wanted.pipeline if devices is None else devices
        raise UsageError(f"{error}{nearest_text(alone, wanted, devices=world, device=device)}") from None
