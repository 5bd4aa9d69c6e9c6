"""Largest memory of this process since a chosen moment."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start the peak at what is in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest memory since `reset_peak`: tensors on CUDA, the resident process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Memory of the process now."""
    return _status_bytes("VmRSS") or 0


def _status_bytes(field: str) -> int | None:
    """A line of /proc/self/status; some sandboxes leave lines out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
