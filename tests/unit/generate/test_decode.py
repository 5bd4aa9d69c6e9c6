"""Decoding with cached keys and values against running everything again for each token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megavl.generate.decode import CachedSequence, generate
from megavl.generate.sampling import Sampling
from megavl.model.attention import segments
from megavl.model.vl_model import DeepseekVL
from tests.unit.generate import models

NEVER = -1


@pytest.fixture(scope="module", params=models.PRESETS)
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekVL]:
    with models.built(request.param) as built:
        built.preset = request.param
        yield built


def prompt(model: DeepseekVL, *, images: int) -> tuple[list[int], torch.Tensor]:
    config, generator = models.config_of(model.preset), torch.Generator().manual_seed(3)
    ids = [0, *torch.randint(4, 1024, (9,), generator=generator).tolist()]
    for _ in range(images):
        ids += [3] * config.image_tokens + torch.randint(4, 1024, (5,), generator=generator).tolist()
    side = config.canvas_size
    return ids, torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def logits_from_scratch(model: DeepseekVL, ids: list[int], images: torch.Tensor) -> torch.Tensor:
    packed = segments(torch.tensor([0, len(ids)], dtype=torch.int32), device=torch.device("cpu"), on_device=False)
    return model(tokens=torch.tensor([ids]), images=images, packed=packed)[0, -1]


@pytest.mark.parametrize("images", [0, 2])
def test_cached_decoding_equals_full_recomputation(model, images, report_table):
    ids, pixels = prompt(model, images=images)
    # Random tokens are forced in, for tiny random models repeat themselves when left alone.
    forced = torch.randint(4, 1024, (12,), generator=torch.Generator().manual_seed(5)).tolist()
    sequence = CachedSequence(model, max_length=len(ids) + 12)
    logits, errors, chosen = sequence.extend(ids, images=pixels), [], set()
    for count in range(12):
        expected = logits_from_scratch(model, ids + forced[:count], pixels)
        errors.append(float((logits - expected).abs().max() / expected.abs().max()))
        assert logits.argmax() == expected.argmax()
        chosen.add(int(logits.argmax()))
        logits = sequence.extend(forced[count : count + 1])
    report_table(["logits, cached against recomputed, relative", max(errors), "limit 1e-5"])
    assert all(error < 1e-5 for error in errors)
    assert len(chosen) > 1


@pytest.mark.parametrize("images", [0, 2])
def test_greedy_tokens_are_those_of_full_recomputation(model, images):
    ids, pixels = prompt(model, images=images)
    expected: list[int] = []
    for _ in range(12):
        expected.append(int(logits_from_scratch(model, ids + expected, pixels).argmax()))
    assert list(generate(model, ids, images=pixels, eos_id=NEVER, max_new_tokens=12)) == expected


def test_decoding_stops_behind_the_end_of_sentence(model):
    ids, pixels = prompt(model, images=1)
    free = list(generate(model, ids, images=pixels, eos_id=NEVER, max_new_tokens=8))
    stopped = list(generate(model, ids, images=pixels, eos_id=free[3], max_new_tokens=8))
    assert stopped == free[: free.index(free[3]) + 1]


def test_the_picture_decides(model):
    ids, pixels = prompt(model, images=1)
    seen, other = (CachedSequence(model, max_length=99).extend(ids, images=x) for x in (pixels, 255 - pixels))
    assert float((seen - other).abs().max()) > 1e-3


def test_draws_depend_on_the_seed_alone(model):
    ids, pixels = prompt(model, images=1)

    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return list(generate(model, ids, images=pixels, eos_id=NEVER, max_new_tokens=8, sampling=sampling))

    assert draw(1) == draw(1) != draw(2)


def test_only_the_last_position_gets_logits(model):
    ids, pixels = prompt(model, images=1)
    assert CachedSequence(model, max_length=64).extend(ids, images=pixels).shape == (1024,)
