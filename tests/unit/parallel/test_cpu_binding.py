"""Cores beside a GPU, from a copy of what Linux says of a machine with two NUMA nodes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavl.parallel import cpu_binding
from megavl.parallel.cpu_binding import bind_to_device, cores_beside

FIRST, SECOND = frozenset({0, 1, 8, 9}), frozenset({4, 5, 6})
GPU = "0000:3b:00.0"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, Path]:
    """Nodes 0 and 1 with cores, node 2 with memory alone, and one GPU beside node 1."""
    devices, nodes = tmp_path / "devices", tmp_path / "nodes"
    (devices / GPU).mkdir(parents=True)
    (devices / GPU / "numa_node").write_text("1\n")
    for number, cores in enumerate(("0-1,8-9", "4-6", "")):
        (nodes / f"node{number}").mkdir(parents=True)
        (nodes / f"node{number}" / "cpulist").write_text(cores + "\n")
    return {"devices": devices, "nodes": nodes}


def test_allowed_cores_of_the_device_node(machine: dict[str, Path]) -> None:
    assert cores_beside(GPU, allowed=FIRST | SECOND, **machine) == SECOND
    assert cores_beside(GPU, allowed={0, 4, 6}, **machine) == {4, 6}
    assert cores_beside(GPU, allowed={0, 1, 4}, **machine) == set(), "a third of the node"


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [
        (SECOND, "bound there already"),
        ({4}, "bound there already"),
        (FIRST, "bound to the other node"),
        ({0, 99}, "none of its cores"),
    ],
)
def test_a_bound_process_stays(machine: dict[str, Path], allowed: set[int], reason: str) -> None:
    assert cores_beside(GPU, allowed=allowed, **machine) == set(), reason


@pytest.mark.parametrize("said", [None, "-1", "", "x", "7"])
def test_an_unknown_node_changes_nothing(machine: dict[str, Path], said: str | None) -> None:
    file = machine["devices"] / GPU / "numa_node"
    file.unlink() if said is None else file.write_text(said)
    assert cores_beside(GPU, allowed=FIRST | SECOND, **machine) == set()


def test_one_node_needs_no_binding(machine: dict[str, Path]) -> None:
    for number in (0, 2):
        (machine["nodes"] / f"node{number}" / "cpulist").unlink()
        (machine["nodes"] / f"node{number}").rmdir()
    assert cores_beside(GPU, allowed=FIRST | SECOND, **machine) == set()


def test_the_process_is_bound_to_a_real_core(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    where = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    asked: list[Any] = []

    def beside(address: str, *, allowed: set[int]) -> set[int]:
        asked.append((address, allowed))
        return one

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: where)
    monkeypatch.setattr(cpu_binding, "cores_beside", beside)
    try:
        assert bind_to_device() == (one if one != before else set())
        assert os.sched_getaffinity(0) == one
    finally:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(thread), before)
    assert asked == [(GPU, before)]
