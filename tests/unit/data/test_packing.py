"""Packing invariants, and fill on data like the training data."""

import hashlib
import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.whole_packing import Packs
from tests.unit.data.whole_packing import pack as packs_of

S, K = 256, 3
EARLIER = ["4436fcd78d6702cb", "cb885e41a3b99574"]
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


def one_by_one(samples: list[tuple[int, int]]) -> tuple[Lists, Lists]:
    """The method in its plainest form: each sample looks at the packs with its least sufficient room."""
    order = sorted(range(len(samples)), key=lambda n: (-samples[n][1], -samples[n][0], n))
    mixed: Lists = []
    alone: Lists = []
    shelves: list[dict[int, list[int]]] = [{} for _ in range(K + 1)]
    gaps: dict[int, list[int]] | None = None
    texts: dict[int, list[int]] = {}

    def fitting(shelf: dict[int, list[int]], length: int) -> int | None:
        return min((room for room, pile in shelf.items() if room >= length and pile), default=None)

    for number in order:
        length, images = samples[number]
        if images:
            for free in range(images, K + 1):
                if (room := fitting(shelves[free], length)) is not None:
                    which = shelves[free][room].pop()
                    break
            else:
                room, which, free = S, len(mixed), K
                mixed.append([])
            mixed[which].append(number)
            shelves[free - images].setdefault(room - length, []).append(which)
            continue
        if gaps is None:
            gaps = {}
            for shelf in shelves:
                for room, pile in shelf.items():
                    gaps.setdefault(room, []).extend(pile)
        packs, shelf = (mixed, gaps) if fitting(gaps, length) is not None else (alone, texts)
        found = fitting(shelf, length)
        which = shelf[found].pop() if found is not None else len(alone)
        if found is None:
            alone.append([])
        packs[which].append(number)
        shelf.setdefault((S if found is None else found) - length, []).append(which)
    return alone, mixed


@settings(deadline=None, max_examples=200)
@given(SAMPLES)
def test_packing_kinds_equals_packing_samples(samples: list[tuple[int, int]]) -> None:
    lengths, images = [length for length, _ in samples], [count for _, count in samples]
    assert pack(lengths, images=images, seq_length=S, max_images=K) == one_by_one(samples)


def test_equal_samples_are_packed_as_one_by_one() -> None:
    draw = random.Random(3)
    for case in range(20):
        kinds = [(draw.randint(1, S // draw.randint(1, 9)), draw.choice([0, 0, 1, 2, 3])) for _ in range(case + 1)]
        samples = draw.choices(kinds, k=draw.randint(1, 800))
        lengths, images = [length for length, _ in samples], [count for _, count in samples]
        assert pack(lengths, images=images, seq_length=S, max_images=K) == one_by_one(samples), case


def test_packing_equals_that_of_earlier_versions() -> None:
    """Digests of the packs as they were when every sample was placed by itself."""
    draw = np.random.default_rng(7)
    digests = []
    for packed in (True, False):
        images = np.where(draw.random(30_000) < 0.4, draw.integers(1, 6, 30_000), 0).astype(np.int32)
        lengths = np.minimum(4096, images * 576 + draw.lognormal(5.5, 1.1, 30_000).astype(np.int32) + 1)
        found = packs_of(lengths, images=images, seq_length=4096, max_images=5, packed=packed)
        parts = [array for one in found for array in (one.samples.astype("<i8"), one.packs.astype("<i8"))]
        digests.append(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16])
    assert digests == EARLIER


def test_unpacked_keeps_samples_apart() -> None:
    assert pack([5, 6, 7], images=[0, 1, 0], seq_length=9, max_images=1, packed=False) == ([[0], [2]], [[1]])


def test_packed_sequences_are_full() -> None:
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
    assert sum(lengths) / (4096 * len(packs)) >= 0.999
    assert sum(held) / len(held) > 4.9
