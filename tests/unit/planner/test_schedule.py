"""The order of passes equals megatron-core's tables; the simulation equals closed forms and a slow reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megavl.planner.schedule import Compute, Exchange, passes, program, warmup_passes
from megavl.planner.simulation.simulate import pipeline_seconds, simulate
from megavl.planner.simulation.times import Pass

SIZES = [
    (p, v, m) for p in (1, 2, 3, 4) for v in (1, 2, 3) for m in (1, 2, 3, 4, 8, 12) if v == 1 or (p > 1 and m % p == 0)
]
SECONDS = st.floats(min_value=0.0, max_value=5.0, allow_nan=False)


def megatron_warmup(rank: int, pipeline: int, virtual: int, count: int) -> int:
    group = SimpleNamespace(size=lambda: pipeline, rank=lambda: rank)
    virtual_size = virtual if virtual > 1 else None
    communicator: Any = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual_size)
    _, _, warm, _ = get_pp_rank_microbatches(count, virtual, pipeline, p2p_communicator=communicator)
    return int(warm)


@pytest.mark.parametrize(("pipeline", "virtual", "count"), SIZES)
def test_order_is_megatron_cores(pipeline: int, virtual: int, count: int) -> None:
    table = get_schedule_table(count, virtual, pipeline)
    for rank in range(pipeline):
        steps = passes(rank, pipeline=pipeline, virtual=virtual, micro_batches=count)
        forward = [(step.micro_batch, step.stage // pipeline) for step in steps if not step.backward]
        backward = [(step.micro_batch, step.stage // pipeline) for step in steps if step.backward]
        assert forward == table
        assert backward == [(micro_batch, virtual - 1 - chunk) for micro_batch, chunk in table]
        assert {step.stage % pipeline for step in steps} == {rank}
        warm = megatron_warmup(rank, pipeline, virtual, count)
        assert warmup_passes(rank, pipeline=pipeline, virtual=virtual, micro_batches=count) == warm
        first_backward = next(index for index, step in enumerate(steps) if step.backward)
        assert first_backward == min(warm + 1, len(forward))


@pytest.mark.parametrize(("pipeline", "virtual", "count"), SIZES)
def test_every_tensor_is_sent_once_and_received_once(pipeline: int, virtual: int, count: int) -> None:
    posted = [
        transfer
        for rank in range(pipeline)
        for step in program(rank, pipeline=pipeline, virtual=virtual, micro_batches=count)
        if isinstance(step, Exchange)
        for transfer in step.transfers
    ]
    assert len(posted) == 2 * len(set(posted)) == 2 * 2 * count * (pipeline * virtual - 1)


@pytest.mark.parametrize(("pipeline", "virtual", "count"), SIZES)
def test_bubble_of_equal_stages(pipeline: int, virtual: int, count: int) -> None:
    """1F1B: (p - 1) / (m + p - 1) of the step; interleaving divides the lost time by v. Needs m >= p."""
    forward, backward = 1.0, 2.0
    costs = [Pass(forward / virtual, backward / virtual)] * (pipeline * virtual)
    run = simulate(pipeline=pipeline, virtual=virtual, costs=[costs], kinds=[0] * count)
    lost = (pipeline - 1) * (forward + backward) / virtual
    assert run.seconds == pytest.approx(count * (forward + backward) + lost)
    if virtual == 1:
        assert run.bubble == pytest.approx((pipeline - 1) / (count + pipeline - 1))
    assert run.busy == pytest.approx((count * (forward + backward),) * pipeline)
    assert [run.seconds - busy for busy in run.busy] == pytest.approx([lost] * pipeline)


def oracle(
    *, pipeline: int, virtual: int, costs: list[list[Pass]], kinds: list[int], transfer_s: float
) -> tuple[float, dict[Compute, float]]:
    """A slow reference: move start and end of every step until nothing changes."""
    programs = [program(rank, pipeline=pipeline, virtual=virtual, micro_batches=len(kinds)) for rank in range(pipeline)]
    ends = [[0.0] * len(steps) for steps in programs]
    moved = True
    while moved:
        moved = False
        posted: dict[Any, float] = {}
        for steps, times in zip(programs, ends):
            for index, step in enumerate(steps):
                before = times[index - 1] if index else 0.0
                for transfer in step.transfers if isinstance(step, Exchange) else ():
                    posted[transfer] = max(posted.get(transfer, 0.0), before)
        for steps, times in zip(programs, ends):
            for index, step in enumerate(steps):
                before = times[index - 1] if index else 0.0
                if isinstance(step, Exchange):
                    end = max(posted[transfer] + transfer_s for transfer in step.transfers)
                else:
                    cost = costs[kinds[step.micro_batch]][step.stage]
                    end = before + (cost.backward if step.backward else cost.forward)
                if end > times[index] + 1e-12:
                    times[index], moved = end, True
    found = {
        step: time
        for steps, times in zip(programs, ends)
        for step, time in zip(steps, times)
        if isinstance(step, Compute)
    }
    return max(max(times) for times in ends), found


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    pipeline = draw(st.integers(1, 4))
    virtual = draw(st.integers(1, 3)) if pipeline > 1 else 1
    rounds = draw(st.integers(1, 3))
    count = rounds * pipeline if virtual > 1 else draw(st.integers(1, 8))
    kinds = draw(st.integers(1, 2))
    seed = random.Random(draw(st.integers(0, 2**32)))
    costs = [[Pass(seed.random(), 3 * seed.random()) for _ in range(pipeline * virtual)] for _ in range(kinds)]
    return {
        "pipeline": pipeline,
        "virtual": virtual,
        "costs": costs,
        "kinds": [seed.randrange(kinds) for _ in range(count)],
        "transfer_s": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }


@settings(max_examples=60, deadline=None)
@given(cases())
def test_simulation_equals_the_oracle(case: dict[str, Any]) -> None:
    seconds, ends = oracle(**case)
    run = simulate(**case)
    assert run.seconds == pytest.approx(seconds)
    assert {event.step: event.end for event in run.events} == pytest.approx(ends)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_what_every_run_obeys(case: dict[str, Any]) -> None:
    run = simulate(**case)
    costs, kinds, pipeline = case["costs"], case["kinds"], case["pipeline"]
    for rank in range(pipeline):
        own = [costs[kind][stage].total for kind in kinds for stage in range(rank, len(costs[0]), pipeline)]
        assert run.busy[rank] == pytest.approx(sum(own))
    assert run.seconds >= max(run.busy) - 1e-9
    ends = {event.step: event.end for event in run.events}
    starts = {event.step: event.start for event in run.events}
    for step, start in starts.items():
        before = step._replace(stage=step.stage + (1 if step.backward else -1))
        if before in ends:
            far = case["transfer_s"] if pipeline > 1 else 0.0
            assert start >= ends[before] + far - 1e-9


@settings(max_examples=30, deadline=None)
@given(case=cases(), cores=st.just(1))
def test_ranks_on_one_core_take_turns(case: dict[str, Any], cores: int) -> None:
    """If k ranks are each k times slower, their total speed is constant; without transfers one always computes."""
    case = {**case, "transfer_s": 0.0}
    run = simulate(**case, slowdown=tuple(float(k) for k in range(1, case["pipeline"] + 1)))
    work = sum(cost.total for kind in case["kinds"] for cost in case["costs"][kind])
    assert run.seconds == pytest.approx(work)


def test_slowdown_applies_only_while_both_ranks_compute() -> None:
    """Two stages never overlap with one micro-batch; with two, the second forward pass overlaps."""
    costs = [[Pass(1.0, 0.0), Pass(1.0, 0.0)]]
    assert simulate(pipeline=2, virtual=1, costs=costs, kinds=[0], slowdown=(1.0, 2.0)).seconds == pytest.approx(2.0)
    assert simulate(pipeline=2, virtual=1, costs=costs, kinds=[0, 0], slowdown=(1.0, 1.5)).seconds == pytest.approx(3.5)


@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_a_long_step_is_extended(
    virtual: int, report_table: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact for interleaved steps; under 1F1B, two almost equally slow stages may set the pace late."""
    monkeypatch.setattr("megavl.planner.simulation.simulate._SIMULATED", 0)
    draw, worst, tolerance = random.Random(virtual), 0.0, 0.034 if virtual == 1 else 1e-9
    for _ in range(60):
        pipeline = draw.randint(2, 4)
        count = draw.randint(6, 14) * pipeline + (draw.randrange(pipeline) if virtual == 1 else 0)
        costs = [Pass(draw.random(), 2 * draw.random()) for _ in range(pipeline * virtual)]
        sizes: dict[str, Any] = {
            "pipeline": pipeline,
            "virtual": virtual,
            "transfer_s": draw.choice([0.0, 0.2]),
        }
        whole = simulate(costs=[costs], kinds=[0] * count, **sizes).seconds
        extended = pipeline_seconds(costs=costs, micro_batches=count, **sizes)
        worst = max(worst, abs(extended / whole - 1))
    report_table(("worst relative error of 60 random steps", worst, "tolerance", tolerance))
    assert worst <= tolerance


def test_a_short_step_is_simulated_whole() -> None:
    draw = random.Random(0)
    costs = [Pass(draw.random(), 2 * draw.random()) for _ in range(4)]
    whole = simulate(pipeline=4, virtual=1, costs=[costs], kinds=[0] * 100).seconds
    assert pipeline_seconds(pipeline=4, virtual=1, costs=costs, micro_batches=100) == whole
