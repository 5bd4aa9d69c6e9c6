"""The order of packs: nothing lost or repeated within an epoch, weights kept, a function of the seed alone."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.config.errors import DataError
from megavl.data.manifest import Modality
from megavl.data.plan import ModalityPlan
from megavl.data.sampler import Permutation, Sampler


def _sampler(
    *counts: dict[Modality, int], weights: list[float] | None = None, seed: int = 7, size: int = 4, **plan: float
) -> Sampler:
    settled = {"fraction": 0.5, "warmup_steps": 0, **plan}
    shares = weights or [1.0] * len(counts)
    return Sampler(
        counts,
        weights=shares,
        plan=ModalityPlan(seed=seed, **settled),
        global_batch_size=size,  # type: ignore[arg-type]
    )


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permutation_is_one(size: int, key: int) -> None:
    order = Permutation(size, key=key)
    assert sorted(order(index) for index in range(size)) == list(range(size))


def test_permutation_mixes() -> None:
    order = [Permutation(1000, key=1)(index) for index in range(1000)]
    near = sum(abs(a - b) < 10 for a, b in zip(order, order[1:]))
    assert near < 50
    assert order != [Permutation(1000, key=2)(index) for index in range(1000)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 1000))
def test_each_epoch_uses_every_pack_once(count: int, size: int, seed: int) -> None:
    sampler = _sampler({"text": count, "multimodal": 0}, fraction=0.0, size=size, seed=seed)
    steps = 3 * count // size + 2
    drawn = [ref.index for step in range(steps) for ref in sampler.global_batch(step)]
    for epoch in range(2):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_steps_are_of_one_modality_and_pure() -> None:
    sampler = _sampler({"text": 11, "multimodal": 5}, {"text": 0, "multimodal": 9})
    steps = [sampler.global_batch(step) for step in range(40)]
    for step, refs in enumerate(steps):
        assert {ref.modality for ref in refs} == {sampler.plan.modality(step)}
    again = _sampler({"text": 11, "multimodal": 5}, {"text": 0, "multimodal": 9})
    assert [again.global_batch(step) for step in reversed(range(40))] == steps[::-1]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.1, 5.0), min_size=2, max_size=4), st.integers(0, 99))
def test_sources_keep_their_weights_and_their_own_epochs(weights: list[float], seed: int) -> None:
    sampler = _sampler(*[{"text": 30, "multimodal": 0}] * len(weights), weights=weights, seed=seed, fraction=0.0)
    drawn = [ref for step in range(100) for ref in sampler.global_batch(step)]
    per_source = Counter(ref.source for ref in drawn)
    for number, weight in enumerate(weights):
        assert per_source[number] == pytest.approx(400 * weight / sum(weights), abs=len(weights))
        own = [ref.index for ref in drawn if ref.source == number]
        assert len(set(own[:30])) == min(30, len(own))


def test_missing_modality_is_named() -> None:
    with pytest.raises(DataError, match="no source holds multimodal sequences.*multimodal_fraction 0.5"):
        _sampler({"text": 4, "multimodal": 0})
    with pytest.raises(DataError, match="no source holds text sequences"):
        _sampler({"text": 0, "multimodal": 4}, fraction=1.0, warmup_steps=5)
    _sampler({"text": 0, "multimodal": 4}, fraction=1.0)
