"""What a device can do at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megavl.config.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Device:
    """Vendor's limits of one accelerator."""

    name: str
    peak_flops: Mapping[str, float]
    """Dense peak, FLOP/s, by `training.precision`; a missing key means that no peak is known."""
    memory_bytes: int | None
    """Memory, bytes; None: not bounded by the device."""


def _device(name: str, *, bf16: float, fp32: float, memory_bytes: int) -> Device:
    peaks = MappingProxyType({"bf16": bf16, "fp32": fp32})
    return Device(name=name, peak_flops=peaks, memory_bytes=memory_bytes)


DEVICES: dict[str, Device] = {
    # NVIDIA A100 80GB SXM datasheet: bf16 tensor core dense 312 TFLOP/s; fp32 (no TF32) 19.5.
    "a100": _device("a100", bf16=312e12, fp32=19.5e12, memory_bytes=80_000_000_000),
    # NVIDIA H100 SXM datasheet: bf16 1,979 TFLOP/s with sparsity, half of it dense; fp32 67.
    "h100": _device("h100", bf16=989.5e12, fp32=67e12, memory_bytes=80_000_000_000),
    # NVIDIA H200 SXM datasheet: the H100's arithmetic, 141 GB of memory.
    "h200": _device("h200", bf16=989.5e12, fp32=67e12, memory_bytes=141_000_000_000),
    "cpu": Device(name="cpu", peak_flops=MappingProxyType({}), memory_bytes=None),
}
"""Devices by the name that `--device` takes."""


def find_device(name: str) -> Device:
    """Row of `DEVICES`.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in DEVICES:
        raise UsageError(f"--device: unknown device {name!r}; choose from {', '.join(DEVICES)}")
    return DEVICES[name]
