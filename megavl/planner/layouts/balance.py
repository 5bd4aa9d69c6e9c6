"""Decoder layers per stage that minimise the expected step time within the device's memory.

The first stage also runs the encoders on multimodal steps, the last one head and loss; the mixture weighs the two
kinds of step. The closed form m x (slowest rank) + (the other ranks) / v of the step time guides the search. The event
simulation then decides between the best layouts found. In small spaces every layout is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from math import comb

from megavl.planner.cost.memory import rank_memory
from megavl.planner.scenario import Scenario
from megavl.planner.simulation.predict import expected_seconds, kinds_of
from megavl.planner.simulation.times import TimeSource

Layout = tuple[int, ...]
Key = tuple[int, float, int, Layout]
"""Bytes above the memory limit, seconds, unevenness, layout; smaller is better."""

_SMALL_SPACE = 120
"""Largest number of layouts of which every one is simulated."""
_NEAR = 1.05
"""Layouts whose closed form is within this factor of the best one are simulated."""
_SIMULATED = 16
"""Most layouts that are simulated per round."""


def balance(
    scenario: Scenario,
    source: TimeSource,
    *,
    memory_bytes: int | None = None,
    small_space: int = _SMALL_SPACE,
    simulated: bool = True,
) -> Layout:
    """The layout with the smallest expected step time that fits the memory; if none fits, one that does not.

    Ties go to the most even layout, then to the one with fewer early layers: early stages hold the activations of
    more micro-batches.

    Args:
        scenario: recipe and sizes; its layout is not read.
        memory_bytes: limit of one rank; None: no limit.
        small_space: if there are at most so many layouts, all are tried.
        simulated: whether the simulation decides; the closed form is for ranking many scenarios.
    """
    layers, stages = scenario.recipe.model.llm.num_layers, scenario.stages
    if stages == 1:
        return (layers,)
    memory, form = _Memory(scenario, memory_bytes), ClosedForm(scenario, source)

    def rough(layout: Layout) -> Key:
        return memory.overflow(layout), _rounded(form.seconds(layout)), sum(n * n for n in layout), layout

    @cache
    def exact(layout: Layout) -> Key:
        seconds = expected_seconds(scenario, layout, source)
        return memory.overflow(layout), _rounded(seconds), sum(n * n for n in layout), layout

    def relieving(layout: Layout) -> list[Layout]:
        """Layouts with a layer less on a rank that exceeds the memory, else on one of the slowest ranks."""
        ranks = memory.exceeded(layout) or form.slowest(layout)
        return list(_moves(layout, sources=[stage for stage in range(stages) if stage % scenario.pipeline in ranks]))

    if comb(layers + stages - 1, stages - 1) <= small_space:
        return min(every_layout(layers, stages), key=exact if simulated else rough)
    capacity = [memory.capacity(rank, layers) for rank in range(scenario.pipeline)]
    if sum(capacity) < layers:
        return _greedy(layers, stages, form.seconds, capacity=[layers] * scenario.pipeline)
    best = _descend(_greedy(layers, stages, form.seconds, capacity=capacity), rough, relieving)
    if not simulated:
        return best

    def near(layout: Layout) -> list[Layout]:
        limit = form.seconds(best) * _NEAR
        moves = _moves(layout, sources=range(stages))
        return sorted((move for move in moves if form.seconds(move) <= limit), key=rough)[:_SIMULATED]

    return _descend(best, exact, near)


class ClosedForm:
    """Expected seconds of the schedule without simulating it."""

    def __init__(self, scenario: Scenario, source: TimeSource) -> None:
        self._count, self._pipeline, self._virtual = scenario.micro_batches, scenario.pipeline, scenario.virtual
        self._parts = []
        for kind in kinds_of(scenario):
            times = source.blocks(scenario, kind)
            edges = (times.vision + times.embedding).total, times.head.total
            self._parts.append((scenario.weight(kind), times.layer.total, *edges))

    def seconds(self, layout: Layout) -> float:
        """m x (slowest rank) + (the others) / v, over the mixture."""
        out, held = 0.0, self._held(layout)
        for part in self._parts:
            ranks = self._ranks(part, held)
            slowest = max(ranks)
            out += part[0] * (self._count * slowest + (sum(ranks) - slowest) / self._virtual)
        return out

    def slowest(self, layout: Layout) -> set[int]:
        """Ranks that are the slowest in at least one kind of step."""
        held = self._held(layout)
        found = (self._ranks(part, held) for part in self._parts)
        return {rank for ranks in found for rank, seconds in enumerate(ranks) if seconds == max(ranks)}

    def _held(self, layout: Layout) -> list[int]:
        return [sum(layout[rank :: self._pipeline]) for rank in range(self._pipeline)]

    def _ranks(self, part: tuple[float, float, float, float], held: list[int]) -> list[float]:
        _, layer, first, last = part
        ranks = [layer * layers for layers in held]
        ranks[0] += first
        ranks[-1] += last
        return ranks


def even_layout(layers: int, stages: int) -> Layout:
    """As even as possible; later stages take the remainder."""
    return tuple((layers + stage) // stages for stage in range(stages))


def every_layout(layers: int, stages: int) -> Iterator[Layout]:
    """All ways to put `layers` layers on `stages` stages, empty ones included."""
    if stages == 1:
        yield (layers,)
        return
    for here in range(layers + 1):
        for rest in every_layout(layers - here, stages - 1):
            yield (here, *rest)


class _Memory:
    """Bytes by which the ranks of a layout exceed a limit."""

    def __init__(self, scenario: Scenario, limit: int | None) -> None:
        self._scenario, self._limit = scenario, limit
        self._of_rank = cache(self._measure)

    def overflow(self, layout: Layout) -> int:
        """Summed over pipeline ranks."""
        return sum(self._by_rank(layout))

    def exceeded(self, layout: Layout) -> set[int]:
        """Ranks that do not fit."""
        return {rank for rank, excess in enumerate(self._by_rank(layout)) if excess}

    def capacity(self, rank: int, layers: int) -> int:
        """Most of `layers` layers that the rank can hold, evenly over its stages."""
        if self._limit is None:
            return layers
        virtual, least, most = self._scenario.virtual, -1, layers
        while least < most:
            middle = (least + most + 1) // 2
            if self._of_rank(rank, even_layout(middle, virtual)):
                most = middle - 1
            else:
                least = middle
        return max(0, least)

    def _by_rank(self, layout: Layout) -> list[int]:
        ranks = self._scenario.pipeline
        return [] if self._limit is None else [self._of_rank(rank, layout[rank::ranks]) for rank in range(ranks)]

    def _measure(self, rank: int, held: Layout) -> int:
        assert self._limit is not None
        layout = [0] * self._scenario.stages
        layout[rank :: self._scenario.pipeline] = held
        return max(0, rank_memory(self._scenario, rank, layout).total - self._limit)


def _greedy(layers: int, stages: int, estimate: Callable[[Layout], float], *, capacity: list[int]) -> Layout:
    """Add layers one by one to the stage that costs least; of equal stages to the last one with the fewest layers.

    Each rank takes at most its `capacity` of layers over all its stages.
    """
    layout, ranks = (0,) * stages, len(capacity)
    for _ in range(layers):
        room = [stage for stage in range(stages) if sum(layout[stage % ranks :: ranks]) < capacity[stage % ranks]]
        options = [layout[:stage] + (layout[stage] + 1,) + layout[stage + 1 :] for stage in room]
        layout = min(options, key=lambda option: (_rounded(estimate(option)), sum(n * n for n in option), option))
    return layout


def _moves(layout: Layout, *, sources: Iterable[int]) -> Iterator[Layout]:
    """Layouts in which one layer moves from one of the `sources` to another stage."""
    for source in sources:
        if not layout[source]:
            continue
        for target in range(len(layout)):
            if target != source:
                moved = list(layout)
                moved[source] -= 1
                moved[target] += 1
                yield tuple(moved)


def _descend(
    layout: Layout,
    key: Callable[[Layout], Key],
    neighbours: Callable[[Layout], list[Layout]],
) -> Layout:
    """Go to the best neighbour until none is better."""
    while True:
        best = min([layout, *neighbours(layout)], key=key)
        if best == layout:
            return layout
        layout = best


def _rounded(seconds: float) -> float:
    """Nine digits, so that equal times compare equal although their sums were added in another order."""
    return float(f"{seconds:.9g}")
