"""Numbers with units, for tables and error messages."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(value: float) -> str:
    """Bytes with a binary unit."""
    return _scaled(value, base=1024, units=("B", "KiB", "MiB", "GiB", "TiB"))


def format_flops(value: float) -> str:
    """FLOPs with a decimal unit."""
    return _scaled(value, base=1000, units=("", "K", "M", "G", "T", "P", "E"))


def _scaled(value: float, *, base: int, units: Sequence[str]) -> str:
    """`value` with the largest unit that keeps it at 1 or above."""
    power = 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f} {units[power]}".rstrip()
