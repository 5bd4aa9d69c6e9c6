"""What the planner says at the paper's scale; each answer is kept in the cache, because some take a minute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.ablations.definition import Ablation, Simulation
from launch.ablations.records import commit
from launch.bench.programs import run
from megavl.config.errors import UsageError
from megavl.config.load import load_recipe, to_dict
from megavl.config.recipe import Recipe
from megavl.files.durable import replace_durably, storage_errors
from megavl.foreign.parsing import read_json


def check_simulations(ablation: Ablation) -> None:
    """Read the recipes of the simulations, before anything is trained.

    Raises:
        UsageError: a recipe is missing, or wrong with its settings.
    """
    for one in ablation.simulations:
        _recipe(one)


def simulate(ablation: Ablation, *, cache: Path) -> Mapping[str, float]:
    """Value by title.

    Raises:
        UsageError: the planner refuses, or its answer has no number at the key.
        StorageError: an answer cannot be kept.
    """
    return {one.title: _ask(one, cache=cache) for one in ablation.simulations}


def _ask(simulation: Simulation, *, cache: Path) -> float:
    code = commit()
    asked = {**asdict(simulation), "recipe": to_dict(_recipe(simulation)), "commit": code}
    address = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    kept = cache / f"plan-{address}.json"
    # Only a commit alone says what the code is.
    known = None if code.endswith(("-dirty", "unknown")) else _kept(kept)
    answer = known if known is not None else _answer(simulation)
    if known is None:
        with storage_errors(f"{kept}: writing it"):
            replace_durably(kept, json.dumps(answer).encode())
    value = answer
    for part in simulation.key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        raise UsageError(f"simulations: {simulation.key}: megavl plan {simulation.recipe} says no such number")
    return float(value)


def _kept(path: Path) -> Any:
    """An earlier answer; None where there is none, or what is left of it is damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _answer(simulation: Simulation) -> Any:
    text, failure = run("megavl", "plan", simulation.recipe, *_settings(simulation), *simulation.options, "--json")
    if failure:
        raise UsageError(f"simulations: {simulation.title}: megavl plan {simulation.recipe} failed: {failure}")
    return json.loads(text)


def _recipe(simulation: Simulation) -> Recipe:
    try:
        return load_recipe(Path(simulation.recipe), overrides=_settings(simulation))
    except UsageError as error:
        raise UsageError(f"simulations: {simulation.title}: {error}") from None


def _settings(simulation: Simulation) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in simulation.set.items()]
