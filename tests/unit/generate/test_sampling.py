"""Choosing tokens from logits."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megavl.config.errors import NumericsError, UsageError
from megavl.generate.sampling import Sampling, candidates, choose, likeliest, penalised

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def draws(sampling: Sampling, *, count: int = 4000) -> dict[int, float]:
    generator = sampling.generator()
    found = Counter(choose(LOGITS, sampling=sampling, generator=generator) for _ in range(count))
    return {token: number / count for token, number in sorted(found.items())}


REFERENCE = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
}
"""In the order in which transformers' generation applies them."""


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 1},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 0.8, "top_p": 0.05},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.6},
        {"repetition_penalty": 1.3, "temperature": 0.9, "top_k": 30, "top_p": 0.95},
        {"repetition_penalty": 0.5, "temperature": 1.0},
    ],
    ids=str,
)
def test_distribution_equals_transformers(settings, report_table):
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(20):
        logits = 4 * torch.randn(1000, generator=generator, dtype=torch.float64)
        present = torch.randint(0, 1000, (60,), generator=generator)
        processors = LogitsProcessorList(REFERENCE[name](value) for name, value in settings.items())
        expected = processors(present[None], logits[None].clone())[0].double().softmax(-1)
        found = torch.zeros(1000, dtype=torch.float64)
        sampling = Sampling(**settings)
        scores = penalised(logits, sampling=sampling, present=present.tolist())
        probabilities, tokens = candidates(scores, sampling=sampling)
        found[tokens] = probabilities / probabilities.sum()
        assert torch.equal(found > 0, expected > 0)
        worst = max(worst, float((found - expected).abs().max()))
    report_table([str(settings), "probabilities against transformers", worst, "fp64, limit 1e-12"])
    assert worst < 1e-12


def test_repetition_penalty_changes_greedy_choices():
    logits, present = torch.tensor([2.0, 3.0, -1.0, -0.5]), [1, 1]
    processor = RepetitionPenaltyLogitsProcessor(2.0)
    expected = int(processor(torch.tensor([present]), logits[None].clone()).argmax())
    sampling = Sampling(repetition_penalty=2.0)
    assert choose(logits, sampling=sampling, generator=sampling.generator(), present=present) == expected == 0


def test_many_rows_are_chosen_greedily_at_once():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert likeliest(logits) == logits.argmax(-1).tolist()
    for bad in (math.nan, math.inf, -math.inf):
        logits[3, 7] = bad
        with pytest.raises(NumericsError, match="not finite"):
            likeliest(logits)


def test_greedy_takes_the_first_of_ties():
    greedy = Sampling()
    assert choose(torch.tensor([1.0, 3.0, 3.0]), sampling=greedy, generator=greedy.generator()) == 1


def test_draws_follow_the_probabilities():
    assert draws(Sampling(temperature=1.0)) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, abs=0.03)


def test_low_temperature_sharpens_the_distribution():
    weights = [p**2 for p in (0.1, 0.4, 0.2, 0.3)]
    expected = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    assert draws(Sampling(temperature=0.5)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("temperature", [1e-3, 1e-45, 5e-324])
def test_any_temperature_above_0_gives_probabilities(temperature):
    assert set(draws(Sampling(temperature=temperature), count=400)) == {1}


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.41, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_likely_tokens(top_p, kept):
    assert set(draws(Sampling(temperature=1.0, top_p=top_p), count=400)) == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature: -1.0"),
        ({"temperature": math.nan}, "--temperature: nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p: 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p: 1.5"),
        ({"top_p": 0.9}, "--top-p: it has no effect on greedy decoding; give --temperature too"),
        ({"top_k": 5}, "--top-k: it has no effect"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k: -1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty: 0.0"),
        ({"repetition_penalty": math.inf}, "--repetition-penalty: inf"),
        ({"repetition_penalty": 1e-300}, "--repetition-penalty: 1e-300"),
        ({"repetition_penalty": 1e300}, "--repetition-penalty: 1e.300"),
        ({"seed": -1}, "--seed: -1"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)


def test_non_finite_logits_are_refused():
    greedy = Sampling()
    with pytest.raises(NumericsError, match="not finite"):
        choose(torch.tensor([0.0, math.nan]), sampling=greedy, generator=greedy.generator())
