"""The order of sequences: nothing lost or repeated within an epoch, shares exact at every prefix, any step at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.config.data import Grouping
from megavl.config.errors import UsageError
from megavl.data.interleave import MAX_PERIOD, Interleave
from megavl.data.manifest import MODALITIES, Modality
from megavl.data.mixture import Mixture
from megavl.data.permutation import Permutation
from megavl.data.plan import ModalityPlan
from megavl.data.sampler import PackRef, Sampler

Pair = tuple[float, float]
"""Text, multimodal."""


def make_sampler(
    counts: list[tuple[int, int]],
    *,
    weights: list[Pair] | None = None,
    seed: int = 7,
    size: int = 4,
    fraction: float = 0.5,
    warmup: int = 0,
    grouping: Grouping = "step",
) -> Sampler:
    asked = weights or [(1.0, 1.0)] * len(counts)
    drawn = [
        {m: weight if count else 0.0 for m, weight, count in zip(MODALITIES, pair, have, strict=True)}
        for pair, have in zip(asked, counts, strict=True)
    ]
    plan = ModalityPlan(seed=seed, fraction=fraction, warmup_steps=warmup * (size if grouping == "sequence" else 1))
    by_name = [dict(zip(MODALITIES, have, strict=True)) for have in counts]
    return Sampler(by_name, mixture=Mixture(drawn, plan=plan, global_batch_size=size, grouping=grouping))


@st.composite
def samplers(draw: Callable[..., Any]) -> Sampler:
    """Any mixture of one to four sources that all have both modalities."""
    sources = draw(st.integers(1, 4))
    return make_sampler(
        [(draw(st.integers(1, 40)), draw(st.integers(1, 40))) for _ in range(sources)],
        weights=[(draw(st.integers(1, 30)) / 10, draw(st.integers(1, 30)) / 10) for _ in range(sources)],
        seed=draw(st.integers(0, 2**40)),
        size=draw(st.sampled_from([1, 2, 4, 12])),
        fraction=draw(st.integers(0, 20)) / 20,
        warmup=draw(st.integers(0, 30)),
        grouping=draw(st.sampled_from(["step", "sequence"])),
    )


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permutation_maps_one_to_one(size: int, key: int) -> None:
    order = Permutation(size, key=key)
    assert sorted(order(index) for index in range(size)) == list(range(size))


def test_permutation_mixes() -> None:
    order = [Permutation(1000, key=1)(index) for index in range(1000)]
    near = sum(abs(a - b) < 10 for a, b in zip(order, order[1:]))
    assert near < 50
    assert order != [Permutation(1000, key=2)(index) for index in range(1000)]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_prefixes_hold_each_source_to_within_one(weights: list[int]) -> None:
    order = Interleave([Fraction(weight, 7) for weight in weights])
    seen = [0] * len(weights)
    for place in range(min(2 * order.period + 1, 700)):
        for source, weight in enumerate(weights):
            assert order.before(place, source=source) == seen[source]
            assert abs(seen[source] - Fraction(place * weight, sum(weights))) < 1
        source, earlier = order.at(place)
        assert earlier == seen[source]
        seen[source] += 1


def test_weights_without_a_common_step_are_refused() -> None:
    Interleave([Fraction(1), Fraction(MAX_PERIOD - 1)])
    with pytest.raises(UsageError, match=r"weights 1, 100000 repeat only after 100001 sequences.*fewer digits"):
        Interleave([Fraction(1), Fraction(MAX_PERIOD)])


@settings(deadline=None, max_examples=40)
@given(samplers())
def test_each_epoch_uses_every_sequence_once(sampler: Sampler) -> None:
    drawn: dict[tuple[int, Modality], dict[int, int]] = {}
    for step in range(40):
        refs = sampler.global_batch(step)
        found = {ref.modality for ref in refs}
        assert sampler.mixture.modality(step) == ("multimodal" if "multimodal" in found else "text")
        assert len(found) == 1 or sampler.mixture.grouping == "sequence"
        for slot, ref in enumerate(refs):
            *origin, draw = sampler.mixture.draw(step=step, slot=slot)
            assert origin == [ref.source, ref.modality]
            drawn.setdefault((ref.source, ref.modality), {})[draw] = ref.index
    for (source, modality), by_draw in drawn.items():
        indices = [by_draw[draw] for draw in range(len(by_draw))]
        count = sampler._counts[source][modality]
        for first in range(0, len(indices), count):
            epoch = indices[first : first + count]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(count))


@settings(deadline=None, max_examples=40)
@given(samplers(), st.integers(0, 60))
def test_draws_of_a_run_are_predicted(sampler: Sampler, steps: int) -> None:
    drawn = Counter((ref.source, ref.modality) for step in range(steps) for ref in sampler.global_batch(step))
    mixture = sampler.mixture
    for modality in MODALITIES:
        of_modality = sum(count for (_, kind), count in drawn.items() if kind == modality)
        for source in range(mixture.sources):
            found = drawn[source, modality]
            assert mixture.drawn(steps, source=source, modality=modality) == found
            assert abs(found - of_modality * mixture.share(source=source, modality=modality)) < 1 + 1e-6


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**40), st.integers(0, 20), st.sampled_from([2, 4, 12]), st.integers(0, 30))
def test_mixed_steps_each_hold_their_share(seed: int, twentieths: int, size: int, warmup: int) -> None:
    sampler = make_sampler(
        [(30, 30)], seed=seed, size=size, fraction=twentieths / 20, warmup=warmup, grouping="sequence"
    )
    found = 0
    for step in range(40):
        wanted = sampler.plan.wanted_before((step + 1) * size) - sampler.plan.wanted_before(step * size)
        here = sum(ref.modality == "multimodal" for ref in sampler.global_batch(step))
        found += here
        assert abs(here - wanted) <= 1
        assert abs(found - sampler.plan.wanted_before((step + 1) * size)) <= 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**40), st.sampled_from([4, 12]), st.integers(0, 10))
def test_mixing_draws_the_sequences_of_grouped_steps(seed: int, size: int, tenths: int) -> None:
    """Over a run whose target is a whole number of steps."""

    def drawn(grouping: Grouping) -> Counter[PackRef]:
        sampler = make_sampler([(17, 23), (9, 40)], seed=seed, size=size, fraction=tenths / 10, grouping=grouping)
        return Counter(ref for step in range(20) for ref in sampler.global_batch(step))

    assert drawn("step") == drawn("sequence")


def test_mixed_steps_shuffle_their_slots() -> None:
    sampler = make_sampler([(50, 50)], size=12, fraction=0.5, grouping="sequence")
    patterns = {tuple(ref.modality for ref in sampler.global_batch(step)) for step in range(20)}
    assert len(patterns) > 15
    first = sum(sampler.sample(step=step, slot=0).modality == "multimodal" for step in range(400))
    assert 160 < first < 240


def share_of(sampler: Sampler, step: int, *, rank: int, ranks: int) -> list[PackRef]:
    size = sampler.mixture.global_batch_size // ranks
    return [sampler.sample(step=step, slot=slot) for slot in range(rank * size, (rank + 1) * size)]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_resume_depends_on_consumed_samples_alone(data: st.DataObject) -> None:
    """Resuming needs nothing but a number: whoever asks, in whatever order, gets the same sequences."""
    sampler = data.draw(samplers())
    size = sampler.mixture.global_batch_size
    whole = [sampler.global_batch(step) for step in range(12)]
    consumed = data.draw(st.integers(0, 11)) * size
    ranks = data.draw(st.sampled_from([number for number in range(1, size + 1) if size % number == 0]))
    for step in data.draw(st.permutations(range(consumed // size, 12))):
        shares = [share_of(sampler, step, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert [ref for share in shares for ref in share] == whole[step]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_another_batch_size_goes_on_where_it_stopped(data: st.DataObject) -> None:
    """Steps before a forced change had another size: no draw of any source is left out or repeated."""
    mixture = data.draw(samplers()).mixture
    mixture.earlier = tuple(zip(sorted(data.draw(st.sets(st.integers(1, 9), max_size=2))), (3, 5)))
    limits = [step for step, _ in mixture.earlier]
    drawn: dict[tuple[int, str], list[int]] = {}
    for step in range(14):
        size = next((size for limit, size in mixture.earlier if step < limit), mixture.global_batch_size)
        assert mixture.sequences_before(step + 1) - mixture.sequences_before(step) == size
        for slot in range(size if not limits or step >= limits[-1] else 0):
            source, modality, number = mixture.draw(step=step, slot=slot)
            drawn.setdefault((source, modality), []).append(number)
    for (source, modality), numbers in drawn.items():
        first = mixture.drawn(limits[-1] if limits else 0, source=source, modality=modality)
        assert sorted(numbers) == list(range(first, first + len(numbers)))


def test_a_weight_counts_within_its_modality() -> None:
    """The paper's Table 1 in small: text 70, two categories of images 20 and 10; the step's modality decides first."""
    counts = [(50, 0), (9, 50), (0, 50)]
    sampler = make_sampler(counts, weights=[(70, 0), (0, 20), (0, 10)], fraction=0.3, size=6)
    drawn = Counter((ref.source, ref.modality) for step in range(1000) for ref in sampler.global_batch(step))
    assert drawn == {(0, "text"): 4200, (1, "multimodal"): 1200, (2, "multimodal"): 600}


def test_late_steps_and_large_sources_cost_nothing() -> None:
    billion = 10**9
    sampler = make_sampler([(billion, billion), (7, billion)], weights=[(70, 29.7), (0.7, 0.3)], size=2304)
    sampler.sample(step=0, slot=0)
    began = time.process_time()
    for step in range(10**9, 10**9 + 200):
        sampler.sample(step=step, slot=2303)
    assert (time.process_time() - began) / 200 < 0.002
