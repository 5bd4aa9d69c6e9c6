"""Steps over a key-value cache against a plain statement of causal attention with rotary positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megavl.model.cache import KeyValueCache, Step

HEADS, CHANNELS = 3, 8
LAYER = 5


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the engine uses it."""
    with torch.inference_mode():
        yield


def angles(length: int) -> torch.Tensor:
    frequencies = 100.0 ** -(torch.arange(0, CHANNELS, 2) / CHANNELS)
    half = torch.outer(torch.arange(length).float(), frequencies)
    return torch.cat([half, half], dim=-1)[:, None, None]


def new_cache(rows: int) -> KeyValueCache:
    return KeyValueCache(
        rows=rows,
        heads=HEADS,
        head_dim=CHANNELS,
        angles=angles,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


def sequence(length: int, *, seed: int) -> list[torch.Tensor]:
    """q, k and v (length, heads, channels)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, HEADS, CHANNELS, dtype=torch.float64, generator=generator) for _ in range(3)]


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Pairs (c, c + D/2) as complex numbers, turned by the angle of their position."""
    pairs = torch.complex(*x.chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones(1), angles(len(x))[:, 0, :, : CHANNELS // 2]).to(pairs.dtype)
    return torch.cat([turned.real, turned.imag], dim=-1)


def reference(parts: list[torch.Tensor]) -> torch.Tensor:
    """(length, heads, channels) of causal attention."""
    q, k, v = rotate(parts[0]), rotate(parts[1]), parts[2]
    scores = torch.einsum("qad,kad->aqk", q, k) * CHANNELS**-0.5
    ahead = torch.ones(len(q), len(q)).triu(1).bool()
    return torch.einsum("aqk,kad->qad", scores.masked_fill(ahead, float("-inf")).softmax(-1), v)


def run(cache: KeyValueCache, step: Step, parts: list[torch.Tensor]) -> torch.Tensor:
    out = step.attend(LAYER, *parts, scale=None)
    cache.advance(step)
    assert step.tokens == len(parts[0])
    return out


def read(cache: KeyValueCache, row: int, parts: list[torch.Tensor], span: slice) -> torch.Tensor:
    return run(cache, cache.extend(row, span.stop - span.start), [part[span] for part in parts])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("cuts", [(0, 90), (0, 1, 90), (0, 30, 31, 70, 90), (0, 64, 65, 90)])
def test_a_sequence_can_be_read_in_parts(cuts: tuple[int, ...], report_table: Any) -> None:
    parts, cache = sequence(90, seed=1), new_cache(1)
    found = torch.cat([read(cache, 0, parts, slice(a, b)) for a, b in zip(cuts, cuts[1:])])
    worst = error(found, reference(parts))
    report_table(f"cached attention in parts {cuts}: {worst:.1e} (tolerance 1e-6, the rotary table is fp32)")
    assert worst < 1e-6 and cache.lengths == [90]


@pytest.mark.parametrize("lengths", [(5, 5, 5), (63, 2, 40), (1, 64, 70)])
def test_rows_of_any_length_decode_together(lengths: tuple[int, ...], report_table: Any) -> None:
    sequences = [sequence(length + 6, seed=row) for row, length in enumerate(lengths)]
    cache = new_cache(4)
    for row, length in enumerate(lengths):
        read(cache, row, sequences[row], slice(0, length))
    worst = 0.0
    for count in range(6):
        now = [length + count for length in lengths]
        step = cache.append(3)
        new = [torch.stack([parts[i][at] for parts, at in zip(sequences, now)]) for i in range(3)]
        found = run(cache, step, new)
        worst = max(worst, *(error(found[row], reference(parts)[now[row]]) for row, parts in enumerate(sequences)))
    report_table(f"rows of {lengths} tokens and 6 more: {worst:.1e} (tolerance 1e-6)")
    assert worst < 1e-6


def test_rows_can_be_moved_and_truncated() -> None:
    long, short, cache = sequence(80, seed=1), sequence(30, seed=2), new_cache(3)
    read(cache, 0, short, slice(0, 20))
    read(cache, 2, long, slice(0, 70))
    cache.move(2, 0)
    assert cache.lengths == [70, 0, 0]
    cache.truncate(0, 40)
    assert error(read(cache, 0, long, slice(40, 80)), reference(long)[40:]) < 1e-6
    assert error(read(cache, 2, short, slice(0, 30)), reference(short)) < 1e-6


def test_an_aborted_step_leaves_no_trace() -> None:
    parts, cache = sequence(20, seed=1), new_cache(1)
    read(cache, 0, parts, slice(0, 10))
    cache.extend(0, 7).attend(LAYER, *(torch.full((7, HEADS, CHANNELS), 9.0).double() for _ in range(3)), scale=None)
    assert error(read(cache, 0, parts, slice(10, 20)), reference(parts)[10:]) < 1e-6


def test_capacity_is_reserved_or_doubled() -> None:
    cache = new_cache(1)
    cache.reserve(65)
    assert cache.capacity == 128
    cache.reserve(3)
    cache.extend(0, 128)
    assert cache.capacity == 128
    cache.extend(0, 129)
    assert cache.capacity == 256
