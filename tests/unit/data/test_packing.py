"""Packing invariants, and fill on data like the training data."""

import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.packing import Packs
from megavl.data.packing import pack as packs_of

S, K = 256, 3
Lists = list[list[int]]
SAMPLES = st.lists(st.tuples(st.integers(1, S), st.integers(0, K)), max_size=120)


def pack(lengths: list[int], **settings: Any) -> tuple[Lists, Lists]:
    """Text and multimodal packs as lists, after a look at the arrays."""
    found: tuple[Packs, Packs] = packs_of(lengths, **settings)
    for packs in found:
        assert len(packs.samples) == len(packs.packs)
        assert np.unique(packs.packs).tolist() == list(range(packs.count))
    return found[0].lists(), found[1].lists()


@settings(deadline=None, max_examples=200)
@given(SAMPLES)
def test_nothing_is_lost_and_no_limit_is_broken(samples: list[tuple[int, int]]) -> None:
    lengths, images = [length for length, _ in samples], [count for _, count in samples]
    text, multimodal = pack(lengths, images=images, seq_length=S, max_images=K)
    assert sorted(n for members in [*text, *multimodal] for n in members) == list(range(len(samples)))
    for members in [*text, *multimodal]:
        assert sum(lengths[n] for n in members) <= S
        assert sum(images[n] for n in members) <= K
    assert all(not images[n] for members in text for n in members)
    assert all(any(images[n] for n in members) for members in multimodal)
    assert (text, multimodal) == pack(lengths, images=images, seq_length=S, max_images=K)


def test_unpacked_keeps_samples_apart() -> None:
    assert pack([5, 6, 7], images=[0, 1, 0], seq_length=9, max_images=1, packed=False) == ([[0], [2]], [[1]])


def test_fill_and_images_per_sequence() -> None:
    """The settings of the released models: 4096 tokens, 5 images of 576."""
    draw = random.Random(0)
    lengths, images = [], []
    for _ in range(4000):
        count = 1 if draw.random() < 0.85 else draw.randint(2, 5)
        lengths.append(min(4096, 576 * count + int(draw.lognormvariate(4.2, 1.0)) + 1))
        images.append(count)
    for _ in range(9000):
        lengths.append(min(4096, int(draw.lognormvariate(6.3, 1.1)) + 1))
        images.append(0)
    text, multimodal = pack(lengths, images=images, seq_length=4096, max_images=5)
    packs = [*text, *multimodal]
    held = [sum(images[n] for n in members) for members in multimodal]
    assert sum(lengths) / (4096 * len(packs)) > 0.998
    assert sum(held) / len(held) > 4.9
