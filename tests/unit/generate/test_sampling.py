"""From logits to tokens."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megavl.config.errors import NumericsError, UsageError
from megavl.generate.sampling import Sampling, choose

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def draws(sampling: Sampling, *, count: int = 4000) -> dict[int, float]:
    generator = sampling.generator()
    found = Counter(choose(LOGITS, sampling=sampling, generator=generator) for _ in range(count))
    return {token: number / count for token, number in sorted(found.items())}


def test_greedy_takes_the_first_of_the_likeliest():
    greedy = Sampling()
    assert choose(torch.tensor([1.0, 3.0, 3.0]), sampling=greedy, generator=greedy.generator()) == 1


def test_draws_follow_the_probabilities():
    assert draws(Sampling(temperature=1.0)) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, abs=0.03)


def test_temperature_sharpens():
    weights = [p**2 for p in (0.1, 0.4, 0.2, 0.3)]
    expected = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    assert draws(Sampling(temperature=0.5)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.41, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    assert set(draws(Sampling(temperature=1.0, top_p=top_p))) == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature: -1.0"),
        ({"temperature": math.nan}, "--temperature: nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p: 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p: 1.5"),
        ({"top_p": 0.9}, "give --temperature too"),
        ({"seed": -1}, "--seed: -1"),
    ],
)
def test_unusable_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)


def test_logits_that_are_not_finite():
    greedy = Sampling()
    with pytest.raises(NumericsError, match="not finite"):
        choose(torch.tensor([0.0, math.nan]), sampling=greedy, generator=greedy.generator())
