"""What the planner says at the paper's scale; each answer is kept in the cache, because some take a minute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from launch.ablations.definition import Ablation, Simulation
from launch.bench.programs import ask_plan
from megavl.config.errors import UsageError
from megavl.files.durable import replace_durably


def simulate(ablation: Ablation, *, cache: Path) -> Mapping[str, float]:
    """Value by title.

    Raises:
        UsageError: the answer has no number at the key.
    """
    return {one.title: _ask(one, cache=cache) for one in ablation.simulations}


def _ask(simulation: Simulation, *, cache: Path) -> float:
    address = hashlib.sha256(json.dumps(asdict(simulation), sort_keys=True).encode()).hexdigest()[:16]
    kept = cache / f"plan-{address}.json"
    if not kept.is_file():
        settings = [f"{key}={json.dumps(value)}" for key, value in simulation.set.items()]
        answer = ask_plan(simulation.recipe, *settings, *simulation.options)
        replace_durably(kept, json.dumps(answer).encode())
    value = json.loads(kept.read_text(encoding="utf-8"))
    for part in simulation.key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        raise UsageError(f"simulations: {simulation.key}: megavl plan {simulation.recipe} says no such number")
    return float(value)
