"""Keeps a rank on the cores beside its GPU, where copies to the device and NCCL's threads have the shortest way."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

_DEVICES = Path("/sys/bus/pci/devices")
_NODES = Path("/sys/devices/system/node")


def bind_to_device() -> Set[int]:
    """Bind this process, its threads and later children to the cores of its GPU's NUMA node.

    A process that a launcher has bound within one NUMA node stays as it is, and so does one that may run on less than
    half of the GPU's node.

    Returns:
        The cores that it was bound to; empty where nothing changed.
    """
    properties: Any = torch.cuda.get_device_properties()
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    allowed = os.sched_getaffinity(0)
    cores = cores_beside(address, allowed=allowed)
    if not cores or cores == allowed:
        return frozenset()
    for thread in os.listdir("/proc/self/task"):
        try:
            if os.sched_getaffinity(int(thread)) == allowed:
                os.sched_setaffinity(int(thread), cores)
        except OSError:
            # The thread has ended, or the system forbids it.
            continue
    return cores if os.sched_getaffinity(0) == cores else frozenset()


def cores_beside(address: str, *, allowed: Set[int], devices: Path = _DEVICES, nodes: Path = _NODES) -> Set[int]:
    """The allowed cores of a PCI device's NUMA node.

    Args:
        address: the device, such as `0000:3b:00.0`.
        allowed: cores on which this process may run.
        devices, nodes: folders of Linux that describe devices and NUMA nodes.

    Returns:
        Empty where the system does not say, has one node only, or `allowed` lies within one node or holds less than
        half of this one.
    """
    try:
        node = int((devices / address / "numa_node").read_text())
        cores = {int(path.name[4:]): _core_list((path / "cpulist").read_text()) for path in nodes.glob("node[0-9]*")}
    except (OSError, ValueError):
        return frozenset()
    if len(cores) < 2 or any(allowed <= found for found in cores.values()):
        return frozenset()
    # -1: the firmware does not say.
    beside = cores.get(node, frozenset())
    return beside & allowed if 2 * len(beside & allowed) >= len(beside) else frozenset()


def _core_list(text: str) -> frozenset[int]:
    """Linux's list of cores, such as `0-3,8`; a node without cores has an empty one."""
    out: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        out.update(range(int(first), int(last or first) + 1))
    return frozenset(out)
