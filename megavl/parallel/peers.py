"""Tells a lost peer from a defect."""

from __future__ import annotations


def is_communication(error: BaseException) -> bool:
    """Whether a collective failed: torch's own class (a RuntimeError), or gloo's plain one that names its source."""
    text = str(error)
    marks = ("gloo/", "Gloo", "Connection closed by peer", "Connection reset", "NCCL", "ProcessGroup", "Timed out")
    return type(error).__name__.startswith("Dist") or any(mark in text for mark in marks)
