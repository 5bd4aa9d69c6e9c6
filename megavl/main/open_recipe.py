"""Loads a recipe; where its cut of the model cannot work, the message names the nearest one that would."""

from __future__ import annotations

from collections.abc import Sequence

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe, read_raw
from megavl.config.recipe import Recipe
from megavl.planner.hardware.devices import Device
from megavl.planner.layouts.check import Asked, nearest_text

_UNCUT = (
    *("parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.layout=auto"),
    *("parallel.sequence_parallel=false", "parallel.vision=recompute"),
)


def open_uncut(path: str, *, overrides: Sequence[str] = ()) -> Recipe | None:
    """A recipe that says `parallel: auto`, as it is on one device; None where it names its cut.

    Raises:
        UsageError: as `load_recipe`.
    """
    if read_raw(path, overrides=overrides).get("parallel") != "auto":
        return None
    return load_recipe(path, overrides=[*overrides, *_UNCUT])


def open_recipe(
    path: str, *, overrides: Sequence[str] = (), devices: int | None = None, device: Device | None = None
) -> Recipe:
    """Load and check.

    Args:
        path: recipe file.
        overrides: `key.path=value` strings laid over it.
        devices: world size; default: what the recipe asks for.
        device: kind of device, whose memory then counts for the suggestion.

    Raises:
        UsageError: as `load_recipe`; a cut that cannot work comes with the nearest that would.
    """
    try:
        return load_recipe(path, overrides=overrides)
    except UsageError as error:
        if "parallel." not in str(error):
            raise
        try:
            uncut = load_recipe(path, overrides=[*overrides, *_UNCUT])
        except UsageError:
            raise error from None
        asked = Asked.of_mapping(read_raw(path, overrides=overrides))
        world = asked.tensor * asked.pipeline if devices is None else devices
        text = nearest_text(uncut, asked, devices=world, device=device)
        raise UsageError(f"{error}{text}") from None
