"""Learning rates at every boundary of Table 5's schedules."""

from __future__ import annotations

import pytest

from megavl.config.recipe import OptimizerConfig
from megavl.train.schedule import learning_rate


def test_multistep_of_the_7b() -> None:
    config = OptimizerConfig(lr=4.2e-5, schedule="multistep", warmup_steps=2000)
    expected = {1: 2.1e-8, 1000: 2.1e-5, 2000: 4.2e-5, 33600: 4.2e-5, 33601: 1.3272e-5, 37800: 1.3272e-5, 37801: 4.2e-6}
    for step, rate in expected.items():
        assert learning_rate(config, step=step, steps=42000) == pytest.approx(rate)


def test_cosine_falls_from_peak_to_end() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=10)
    rates = [learning_rate(config, step=step, steps=110) for step in range(1, 111)]
    assert rates[9] == 1e-3 and rates[-1] == pytest.approx(1e-4)
    assert rates[59] == pytest.approx(5.5e-4)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_constant_without_warm_up() -> None:
    config = OptimizerConfig(lr=1e-3, schedule="constant")
    assert {learning_rate(config, step=step, steps=5) for step in range(1, 6)} == {1e-3}
