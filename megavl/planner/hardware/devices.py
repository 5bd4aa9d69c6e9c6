"""Rates of devices and their links: vendor limits, measured shares of them, and the source of each number.

A share is what large, favourable shapes reach. Numbers without a published measurement are assumptions, and
`Device.sources` says so. `megavl plan --calibrate` replaces them all by measurements.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Link:
    """Point-to-point link of one device."""

    bandwidth: float
    """Bytes per second in one direction that a collective reaches."""
    latency: float
    """Seconds per message or collective."""

    def seconds(self, data: float) -> float:
        """Time of one message of `data` bytes; an empty one takes none."""
        return self.latency + data / self.bandwidth if data else 0.0


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of accelerator and its links."""

    name: str
    peak_flops: Mapping[str, float]
    """Vendor's dense peak in FLOP/s by `training.precision`, for MFU; a missing key means that none is known."""
    memory_bytes: int | None
    """Memory in bytes; None: the device sets no limit."""
    matrix_flops: Mapping[str, float]
    """FLOP/s that large matrix products reach, by precision."""
    attention_flops: Mapping[str, float]
    """FLOP/s that the attention kernel reaches, by precision."""
    memory_bandwidth: float
    """Bytes per second that elementwise kernels reach."""
    host_s: float
    """Seconds of Python and kernel launches in one decoder layer's forward pass, its shortest time."""
    local: Link
    """To a device of the same node."""
    network: Link
    """To a device of another node, while all devices of the node send."""
    per_node: int
    """Devices of one node."""
    sources: tuple[str, ...]
    """Sources of the numbers, one line each."""

    @property
    def usable_bytes(self) -> int | None:
        """Memory that a layout may use; the rest is for the runtime, buffers and fragmentation."""
        return None if self.memory_bytes is None else math.floor(USABLE_SHARE * self.memory_bytes)


USABLE_SHARE = 0.9
"""Assumed."""


def _nvidia(
    name: str,
    *,
    bf16: float,
    fp32: float,
    matrix: float,
    attention: float,
    memory_bytes: int,
    bandwidth: float,
    local: Link,
    network: Link,
    sources: tuple[str, ...],
) -> Device:
    """A row for a GPU: `matrix` and `attention` are shares of the peak, `bandwidth` is the vendor's."""
    peaks = {"bf16": bf16, "fp32": fp32}
    return Device(
        name=name,
        peak_flops=MappingProxyType(peaks),
        memory_bytes=memory_bytes,
        matrix_flops=MappingProxyType({key: matrix * peak for key, peak in peaks.items()}),
        attention_flops=MappingProxyType({key: attention * peak for key, peak in peaks.items()}),
        memory_bandwidth=_BANDWIDTH_SHARE * bandwidth,
        host_s=_HOST_S,
        local=local,
        network=network,
        per_node=8,
        sources=(*sources, *_ASSUMED),
    )


_BANDWIDTH_SHARE = 0.9
_HOST_S = 4e-4
_ASSUMED = (
    "memory bandwidth: 90% of the vendor's (calculon, systems/a100_80g.json, transfers of 100 MB)",
    "launches: 0.4 ms a decoder layer and pass (assumed)",
    "fp32: the shares of bf16 (assumed)",
)
_MAMF = "stas00/ml-engineering, compute/accelerator, maximum achievable matmul FLOPS, bf16"
_HOPPER = (
    f"matrix products: 80.3% of the peak ({_MAMF}, H100 SXM; H200 is the same)",
    "attention: FlashAttention-2, 319 TFLOP/s forward at 4,096 tokens, head 128, H100 (FlashAttention-3's paper, arXiv "
    "2407.08608)",
    "links: NVLink 450 GB/s a direction at 60%, 400 Gb/s a device at 90% (calculon, systems/h100_80g_nvl8.json)",
    "latency: 10 us in a node, 20 us between nodes (calculon, systems/a100_80g.json)",
)


def _hopper(name: str, *, memory_bytes: int, bandwidth: float, peak: str) -> Device:
    return _nvidia(
        name,
        bf16=989.5e12,
        fp32=67e12,
        matrix=0.803,
        attention=319 / 989.5,
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
        local=Link(bandwidth=0.6 * 450e9, latency=10e-6),
        network=Link(bandwidth=0.9 * 50e9, latency=20e-6),
        sources=(f"peak: {peak}", *_HOPPER),
    )


DEVICES: dict[str, Device] = {
    "a100": _nvidia(
        "a100",
        bf16=312e12,
        fp32=19.5e12,
        matrix=0.869,
        attention=0.60,
        memory_bytes=80_000_000_000,
        bandwidth=2039e9,
        local=Link(bandwidth=0.65 * 300e9, latency=10e-6),
        network=Link(bandwidth=0.9 * 25e9, latency=20e-6),
        sources=(
            "peak: NVIDIA A100 80GB SXM datasheet: bf16 dense 312 TFLOP/s, fp32 without TF32 19.5, 2,039 GB/s",
            f"matrix products: 86.9% of the peak ({_MAMF}, A100 SXM)",
            "attention: 60% of the peak, within the 50% to 73% of FlashAttention-2 (arXiv 2307.08691)",
            "links: NVLink 300 GB/s a direction at 65%, 200 Gb/s a device at 90%, 10 and 20 us (calculon, "
            "systems/a100_80g.json)",
        ),
    ),
    "a100-pcie": _nvidia(
        "a100-pcie",
        bf16=312e12,
        fp32=19.5e12,
        matrix=0.811,
        attention=0.60,
        memory_bytes=40_000_000_000,
        bandwidth=1555e9,
        local=Link(bandwidth=0.75 * 32e9, latency=20e-6),
        network=Link(bandwidth=0.9 * 25e9 / 8, latency=20e-6),
        sources=(
            "node: eight PCIe A100 40GB and one 200 Gb/s adapter, as in Fire-Flyer 2 (arXiv 2408.14158); pairs bridged "
            "by NVLink are not modelled",
            "peak: NVIDIA A100 40GB PCIe datasheet: bf16 dense 312 TFLOP/s, 1,555 GB/s",
            f"matrix products: 81.1% of the peak ({_MAMF}, A100 PCIe)",
            "attention: 60% of the peak, within the 50% to 73% of FlashAttention-2 (arXiv 2307.08691)",
            "links: PCIe 4.0 x16, 32 GB/s a direction at 75% (assumed); 200 Gb/s a node at 90%",
        ),
    ),
    "h100": _hopper(
        "h100",
        memory_bytes=80_000_000_000,
        bandwidth=3350e9,
        peak="NVIDIA H100 SXM datasheet: bf16 1,979 TFLOP/s with sparsity, half of it dense; fp32 67; 3.35 TB/s",
    ),
    "h200": _hopper(
        "h200",
        memory_bytes=141_000_000_000,
        bandwidth=4800e9,
        peak="NVIDIA H200 SXM datasheet: the H100's arithmetic, 141 GB, 4.8 TB/s",
    ),
    "cpu": Device(
        name="cpu",
        peak_flops=MappingProxyType({}),
        memory_bytes=None,
        matrix_flops=MappingProxyType({"fp32": 75e9, "bf16": 250e9}),
        attention_flops=MappingProxyType({"fp32": 25e9, "bf16": 25e9}),
        memory_bandwidth=8e9,
        host_s=1e-3,
        local=Link(bandwidth=1e9, latency=150e-6),
        network=Link(bandwidth=1e9, latency=150e-6),
        per_node=64,
        sources=(
            "one core of an AMD EPYC virtual machine, torch 2.13, one thread a rank, other programs running",
            "matrix products: 73 to 92 GFLOP/s in fp32, 258 to 417 in bf16, of 512 to 1,024 rows (measured)",
            "attention: causal, 512 tokens: 25 to 36 GFLOP/s in fp32, 21 to 27 in bf16 (measured)",
            "memory: 1.2 GB/s into fresh memory, 31 to 133 GB/s within the cache (measured); 8 GB/s is assumed",
            "links: gloo over loopback, 0.5 to 2 GB/s, 107 to 170 us (measured); 1 ms of Python a layer (assumed)",
            "rough: another machine differs by factors, and ranks that share cores slow each other; use --calibrate",
        ),
    ),
}
"""Devices by the name that `--device` takes."""


def known_device(text: str) -> Device | None:
    """Row of the device that torch or a calibration names `text`; None if it has no row."""
    words = re.split(r"[^a-z0-9]+", text.lower())
    known = next((name for name in ("cpu", "h200", "h100", "a100") if name in words), None)
    if known is None:
        return None
    return DEVICES["a100-pcie" if known == "a100" and "pcie" in words else known]
