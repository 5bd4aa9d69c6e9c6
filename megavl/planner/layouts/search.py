"""Ranks the layouts of a recipe on a number of devices, and says why others are rejected.

The space: tensor ranks within a node, pipeline ranks, stages per rank, micro-batch, activation recompute, encoder
placement. Candidates are taken in the order of a lower bound of their expected step time, so the search stops before
those that cannot reach the list. The best of each (tensor, pipeline, virtual) is then simulated. Only the cheapest
recompute setting that fits is kept: more recompute on the same layout is always slower.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megavl.config.recipe import Recipe, RecomputeConfig
from megavl.planner.cost.flops import mfu, model_flops
from megavl.planner.cost.memory import fullest_rank, rank_memory
from megavl.planner.hardware.devices import Device
from megavl.planner.layouts.balance import ClosedForm, balance, even_layout
from megavl.planner.scenario import PLACEMENTS, Kind, Placement, Scenario
from megavl.planner.simulation.predict import expected_extras, expected_seconds, kinds_of
from megavl.planner.simulation.times import BlockTimes, TimeSource

MICRO_BATCHES = (1, 2, 4, 8)
"""Sequences per forward pass that are tried, besides the recipe's own."""
VIRTUAL = (1, 2, 3, 4)
"""Stages per pipeline rank that are tried."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One candidate: sizes, recompute and encoder placement."""

    tensor: int
    pipeline: int
    virtual: int
    micro_batch_size: int
    recompute: RecomputeConfig
    vision: Placement

    @classmethod
    def of(cls, recipe: Recipe) -> Choice:
        """What a recipe asks for."""
        parallel = recipe.parallel
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual_pipeline,
            micro_batch_size=recipe.training.micro_batch_size,
            recompute=recipe.recompute,
            vision=parallel.vision,
        )

    def apply(self, recipe: Recipe, *, layout: tuple[int, ...] | None = None) -> Recipe:
        """The recipe with this choice; its layers are balanced unless `layout` is given."""
        parallel = dataclasses.replace(
            recipe.parallel,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
            vision=self.vision,
            sequence_parallel=self.tensor > 1,
            layout="auto" if layout is None else layout,
        )
        training = dataclasses.replace(recipe.training, micro_batch_size=self.micro_batch_size)
        return dataclasses.replace(recipe, parallel=parallel, training=training, recompute=self.recompute)

    def yaml(self, layout: tuple[int, ...]) -> str:
        """Lines to paste into a recipe; they state every key, since the recipe or its base may set another value."""
        recompute = self.recompute
        parallel: dict[str, object] = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual,
            "sequence_parallel": str(self.tensor > 1).lower(),
            "layout": list(layout),
            "vision": self.vision,
        }
        settings: dict[str, object] = {
            "granularity": recompute.granularity,
            "modules": f"[{', '.join(recompute.modules)}]",
            "num_layers": recompute.num_layers,
            "vision": str(recompute.vision).lower(),
        }
        training: dict[str, object] = {"micro_batch_size": self.micro_batch_size}
        sections = {"parallel": parallel, "recompute": settings, "training": training}
        return "\n".join(
            f"{name}: {{{', '.join(f'{key}: {value}' for key, value in entries.items())}}}"
            for name, entries in sections.items()
        )


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One candidate that fits, with its expected speed and memory."""

    choice: Choice
    layout: tuple[int, ...]
    seconds: float
    """Expected step time."""
    tokens_per_s: float
    mfu: float | None
    memory: int
    """Bytes on the fullest rank."""

    @property
    def yaml(self) -> str:
        """Lines to paste into a recipe."""
        return self.choice.yaml(self.layout)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Result of a search."""

    best: tuple[Ranked, ...]
    """Fastest first, one for each (tensor, pipeline, virtual)."""
    rejected: dict[str, int]
    """Candidates that cannot work, by reason."""
    slower: int
    """Candidates whose lower bound is above the list's times, so that they were not tried."""
    tried: int
    """Candidates in all."""


def search(
    scenario: Scenario,
    source: TimeSource,
    device: Device,
    *,
    top: int = 10,
    virtual: tuple[int, ...] = VIRTUAL,
    placements: tuple[Placement, ...] = PLACEMENTS,
) -> Ranking:
    """Rank the layouts of `scenario.recipe` on `scenario.devices` devices.

    Args:
        scenario: recipe, devices, images and mixture; its own layout is one of the candidates.
    """
    run = _Search(scenario, source=source, device=device)
    for choice in choices(
        scenario,
        per_node=device.per_node,
        virtual=virtual,
        placements=placements,
        rejected=run.rejected,
        leanest=False,
    ):
        run.offer(choice)
    tried = run.queued + run.rejected.total()
    run.balance_best(top)
    ranked = sorted((run.simulated(*found) for found in run.shortlist(top)), key=lambda item: item.seconds)
    return Ranking(best=tuple(ranked[:top]), rejected=dict(run.rejected), slower=len(run.heap), tried=tried)


def recomputes(recipe: Recipe) -> tuple[RecomputeConfig, ...]:
    """Recompute settings from the fastest to the leanest, with the recipe's own; of encoders only if one trains."""
    encoders = bool({"siglip", "sam_trunk"} & set(recipe.trainable_parts))
    plain = [
        RecomputeConfig(granularity="none"),
        RecomputeConfig(granularity="selective", modules=("mlp",)),
        RecomputeConfig(granularity="full"),
    ]
    found = plain if not encoders else [plain[0], *(dataclasses.replace(setting, vision=True) for setting in plain)]
    own = recipe.recompute
    return tuple(found) if own in found else (found[0], own, *found[1:])


def choices(
    scenario: Scenario,
    *,
    per_node: int,
    virtual: tuple[int, ...] = VIRTUAL,
    placements: tuple[Placement, ...] = PLACEMENTS,
    rejected: Counter[str] | None = None,
    leanest: bool = True,
) -> Iterator[Choice]:
    """Every choice for the recipe whose sizes fit each other.

    Args:
        scenario: recipe, devices and images; its own layout is ignored.
        per_node: most tensor-parallel ranks.
        rejected: counts sizes that do not fit, by reason.
        leanest: try every recompute setting; else only the fastest.
    """
    recipe, devices, out = scenario.recipe, scenario.devices, Counter[str]() if rejected is None else rejected
    llm, batch = recipe.model.llm, recipe.training.global_batch_size
    settings = recomputes(recipe) if leanest else recomputes(recipe)[:1]
    images = scenario.images > 0 and scenario.share > 0
    for tensor in _divisors(devices, per_node):
        for pipeline in _divisors(devices // tensor, llm.num_layers + 2):
            replicas = devices // (tensor * pipeline)
            for size, stages in product(sorted({*MICRO_BATCHES, recipe.training.micro_batch_size}), virtual):
                if stages > 1 and pipeline == 1:
                    continue
                reason = _problem(recipe, tensor, pipeline, stages, size, window=replicas * size, batch=batch)
                if reason is not None:
                    out[reason] += 1
                    continue
                for vision, recompute in product(_placements(placements, tensor, pipeline, images), settings):
                    yield Choice(
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual=stages,
                        micro_batch_size=size,
                        recompute=recompute,
                        vision=vision,
                    )


def scenario_with(scenario: Scenario, choice: Choice) -> Scenario:
    """The same run with another choice."""
    return dataclasses.replace(scenario, recipe=choice.apply(scenario.recipe))


class _Search:
    def __init__(self, scenario: Scenario, *, source: TimeSource, device: Device) -> None:
        self.scenario, self.source, self.device = scenario, source, device
        self.recomputes = recomputes(scenario.recipe)
        self.rejected: Counter[str] = Counter()
        self.heap: list[tuple[float, int, Choice]] = []
        self.found: dict[tuple[int, int, int], tuple[float, Choice, tuple[int, ...]]] = {}
        self.queued = 0
        self._times: dict[tuple[object, ...], BlockTimes] = {}

    def offer(self, choice: Choice) -> None:
        """Queue a candidate by the lower bound of its expected step time."""
        if not self.source.covers(scenario_with(self.scenario, choice)):
            self._next_recompute(choice, reason="not in the calibration")
            return
        self.queued += 1
        heapq.heappush(self.heap, (self._bound(choice), self.queued, choice))

    def balance_best(self, top: int) -> None:
        """Balance candidates until no other one can reach the list."""
        while self.heap and self.heap[0][0] < self._limit(top):
            _, _, choice = heapq.heappop(self.heap)
            scenario = scenario_with(self.scenario, choice)
            if not self._state_fits(scenario):
                self._next_recompute(choice, reason=_NO_MEMORY)
                continue
            layout = balance(scenario, self.source, memory_bytes=self.device.usable_bytes, simulated=False)
            if fullest_rank(scenario, layout)[1].total > (self.device.usable_bytes or math.inf):
                self._next_recompute(choice, reason=_NO_MEMORY)
                continue
            seconds = ClosedForm(scenario, self.source).seconds(layout) + expected_extras(scenario, layout, self.source)
            key = (choice.tensor, choice.pipeline, choice.virtual)
            if key not in self.found or seconds < self.found[key][0]:
                self.found[key] = (seconds, choice, layout)

    def shortlist(self, top: int) -> list[tuple[Choice, tuple[int, ...]]]:
        """The best by closed form, `_SPARE` more than `top`."""
        best = sorted(self.found.values(), key=lambda item: item[0])[: top + _SPARE]
        return [(choice, layout) for _, choice, layout in best]

    def simulated(self, choice: Choice, layout: tuple[int, ...]) -> Ranked:
        """A candidate with its simulated step time."""
        scenario = scenario_with(self.scenario, choice)
        seconds = expected_seconds(scenario, layout, self.source)
        peak = self.device.peak_flops.get(scenario.recipe.training.precision)
        flops = sum(scenario.weight(kind) * model_flops(scenario, kind) for kind in kinds_of(scenario))
        return Ranked(
            choice=choice,
            layout=layout,
            seconds=seconds,
            tokens_per_s=scenario.step_tokens / seconds,
            mfu=mfu(flops, seconds=seconds, devices=scenario.devices, peak_flops=peak) if peak else None,
            memory=fullest_rank(scenario, layout)[1].total,
        )

    def _state_fits(self, scenario: Scenario) -> bool:
        """Whether weights, gradients and optimizer state fit on all ranks together; no layout changes their sum."""
        if self.device.usable_bytes is None:
            return True
        even = even_layout(scenario.recipe.model.llm.num_layers, scenario.stages)
        ranks = [rank_memory(scenario, rank, even) for rank in range(scenario.pipeline)]
        state = sum(rank.weights + rank.gradients + rank.optimizer for rank in ranks)
        return state <= scenario.pipeline * self.device.usable_bytes

    def _next_recompute(self, choice: Choice, *, reason: str) -> None:
        following = self.recomputes.index(choice.recompute) + 1
        if following == len(self.recomputes):
            self.rejected[reason] += 1
            return
        self.offer(dataclasses.replace(choice, recompute=self.recomputes[following]))

    def _limit(self, top: int) -> float:
        """Time of the list's last candidate by closed form, with a margin for what the simulation may change."""
        times = sorted(item[0] for item in self.found.values())
        return times[top - 1] * _ROOM if len(times) >= top else math.inf

    def _bound(self, choice: Choice) -> float:
        """Time by the closed form if all ranks had equal load; no layout of this candidate is faster."""
        replicas = self.scenario.devices // (choice.tensor * choice.pipeline)
        count = self.scenario.recipe.training.global_batch_size // (replicas * choice.micro_batch_size)
        layers, out = self.scenario.recipe.model.llm.num_layers, 0.0
        for kind in kinds_of(self.scenario):
            times = self._block_times(choice, kind)
            first = (times.vision + times.embedding).total
            total = layers * times.layer.total + first + times.head.total
            slowest = max(total / choice.pipeline, first)
            out += self.scenario.weight(kind) * (count * slowest + (total - slowest) / choice.virtual)
        return out

    def _block_times(self, choice: Choice, kind: Kind) -> BlockTimes:
        """Seconds of blocks; choices that differ only in pipeline sizes share them."""
        key = (choice.tensor, choice.micro_batch_size, choice.recompute, choice.vision, kind)
        if key not in self._times:
            self._times[key] = self.source.blocks(scenario_with(self.scenario, choice), kind)
        return self._times[key]


_NO_MEMORY = "too little memory, even with full recompute"
_SPARE = 4
_ROOM = 1.05


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _problem(
    recipe: Recipe, tensor: int, pipeline: int, stages: int, size: int, *, window: int, batch: int
) -> str | None:
    """Why these sizes do not fit each other; None if they do."""
    llm = recipe.model.llm
    for name in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        if getattr(llm, name) % tensor:
            return f"tensor ranks do not divide model.llm.{name}"
    if size * recipe.data.seq_length % tensor:
        return "tensor ranks do not divide the tokens of a micro-batch"
    if batch % window:
        return "the global batch is no multiple of data-parallel ranks x micro-batch"
    if stages > 1 and stages * pipeline > llm.num_layers + 2:
        return "more virtual stages than decoder layers + 2"
    if stages > 1 and batch // window % pipeline:
        return "virtual stages: micro-batches are no multiple of pipeline ranks"
    return None


def _placements(placements: tuple[Placement, ...], tensor: int, pipeline: int, images: bool) -> tuple[Placement, ...]:
    """Placements that make a difference: with one tensor rank `split_tp` does not, nor `split_all` with one stage."""
    useful: dict[Placement, bool] = {"recompute": True, "split_tp": tensor > 1, "split_all": pipeline > 1}
    return tuple(name for name in placements if name == "recompute" or (images and useful[name]))
