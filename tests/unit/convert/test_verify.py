"""Comparison of two sets of weights."""

import math

import torch

from megavl.convert.verify import compare
from megavl.weights.lazy import LazyTensor


def of(**tensors):
    return {name: LazyTensor.of(torch.tensor(value)) for name, value in tensors.items()}


def test_equal_sets_are_identical():
    verdict = compare(of(a=[1.0, math.nan], b=[math.inf]), of(b=[math.inf], a=[1.0, math.nan]))
    assert verdict.identical and verdict.summary() == "2 tensors, all equal"


def test_types_may_differ():
    assert compare(of(a=[1.5]), {"a": LazyTensor.of(torch.tensor([1.5], dtype=torch.bfloat16))}).identical


def test_differences_are_measured_and_sorted():
    verdict = compare(of(a=[1.0, -4.0], b=[100.0], c=[1.0]), of(a=[1.0, -3.0], b=[101.0], c=[1.0]))
    assert [(item.name, item.max_abs, item.max_rel) for item in verdict.different] == [
        ("a", 1.0, 0.25),
        ("b", 1.0, 0.01),
    ]
    assert (verdict.max_abs, verdict.max_rel, verdict.identical) == (1.0, 0.25, False)
    assert "3 tensors compared, 2 different (max abs 1, max rel 0.25)" in verdict.summary()


def test_names_and_shapes_are_compared():
    verdict = compare(of(a=[1.0], b=[1.0], c=[1.0]), of(b=[1.0, 2.0], c=[1.0], d=[1.0]))
    assert (verdict.compared, verdict.missing, verdict.extra, verdict.misshapen) == (1, ("a",), ("d",), ("b",))
    assert not verdict.identical and "missing: a" in verdict.summary()


def test_nan_against_a_number_is_infinitely_far():
    assert compare(of(a=[math.nan]), of(a=[0.0])).max_abs == math.inf
    assert compare(of(a=[0.0]), of(a=[1.0])).max_rel == math.inf


def test_large_tensors_are_compared_in_full():
    a = torch.zeros(5_000_000)
    b = a.clone()
    b[-1] = 2.0
    verdict = compare({"a": LazyTensor.of(a)}, {"a": LazyTensor.of(b)})
    assert verdict.max_abs == 2.0
