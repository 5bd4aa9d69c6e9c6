"""Images that a data-parallel rank needs in a second, and the processes and buffer that keep up with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavl.planner.scenario import Scenario
from megavl.planner.simulation.predict import expected_seconds
from megavl.planner.simulation.times import TimeSource

DECODED_PER_SECOND = 70
"""Images that one process decodes and resizes: the slowest row in the report of `launch.bench.loader`, at one core."""
_SPARE = 1.5
"""Steps and images vary; ranks and their libraries take a part of each core."""
_STEPS_AHEAD = 2
_LEAST_AHEAD, _MOST_AHEAD = 64, 512


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What one data-parallel rank decodes, and with what."""

    images_per_second: float
    """Mean over the mixture. Text-only steps leave time in which images of later steps are decoded."""
    workers: int
    """Processes: `data.num_workers`, or what it takes if that is `auto`."""
    prefetched: int
    """Images ahead: `data.prefetch_images`, or those of two multimodal steps if that is `auto`."""


def decoding(scenario: Scenario, layout: Sequence[int], source: TimeSource) -> Decoding:
    """Work and means of one data-parallel rank.

    Args:
        layout: decoder layers per stage.
        source: the seconds of a step.
    """
    data, training = scenario.recipe.data, scenario.recipe.training
    in_step = scenario.images * training.global_batch_size / scenario.data_parallel
    rate = scenario.share * in_step / expected_seconds(scenario, layout, source) if scenario.share else 0.0
    needed = max(1, math.ceil(_SPARE * rate / DECODED_PER_SECOND))
    ahead = min(max(_LEAST_AHEAD, math.ceil(_STEPS_AHEAD * in_step)), _MOST_AHEAD)
    return Decoding(
        images_per_second=rate,
        workers=needed if data.num_workers == "auto" else data.num_workers,
        prefetched=ahead if data.prefetch_images == "auto" else data.prefetch_images,
    )
