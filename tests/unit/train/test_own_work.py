"""The slowest rank and the largest memory of a step."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavl.train import own_work
from megavl.train.own_work import OwnWork, slowest_rank


class Ranks:
    """Stands for a group: the other ranks' values are known."""

    def __init__(self, others: list[tuple[int, int]]) -> None:
        self.others = others

    def all_reduce(self, values: torch.Tensor, op: Any) -> None:
        assert op is dist.ReduceOp.MAX
        for rank, (micros, peak) in enumerate(self.others, start=1):
            other = torch.tensor([micros, peak], dtype=torch.int64) * (1 << 20) + rank
            torch.maximum(values, other, out=values)


def test_slowest_rank_and_largest_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rank 1,000 needs 141 GB for hours: the packed integers hold them.
    ranks = Ranks([(1, 1)] * 999 + [(20_000_000_000, 1), (5, 141 << 30)])
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", ranks.all_reduce)
    work = OwnWork()
    work.begin()
    work.end()
    found = slowest_rank(work)
    assert found == {
        "slowest_rank_s": 20_000.0,
        "slowest_rank": 1000,
        "peak_memory_bytes": 141 << 30,
        "peak_memory_rank": 1001,
    }


def test_work_ends_with_the_last_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1.0, 3.5))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    work = OwnWork()
    work.begin()
    work.end()
    assert work.seconds() == 2.5 and own_work.peak_memory_bytes() > 1e8
