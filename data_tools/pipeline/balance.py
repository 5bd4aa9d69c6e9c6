"""What became of every image, video, audio clip and turn of the input: stored, rejected or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megavl.config.errors import DataError

KINDS = ("images", "videos", "audio", "turns")


class Balance:
    """Counts of one task or of a run; `counts` maps `KIND/found`, `KIND/stored`, `KIND/rejected/REASON` and
    `KIND/left_out/REASON` to numbers."""

    def __init__(self) -> None:
        """Empty."""
        self.counts: Counter[str] = Counter()

    def found(self, counts: Mapping[str, int]) -> None:
        """Count what a record holds, by kind."""
        self._add(counts, "found")

    def stored(self, counts: Mapping[str, int]) -> None:
        """Count what became part of a sample."""
        self._add(counts, "stored")

    def rejected(self, counts: Mapping[str, int], *, reason: str) -> None:
        """Count what a rejected record holds."""
        self._add(counts, f"rejected/{reason}")

    def left_out(self, counts: Mapping[str, int], *, reason: str) -> None:
        """Count what a stored record holds but its sample does not."""
        self._add(counts, f"left_out/{reason}")

    def _add(self, counts: Mapping[str, int], fate: str) -> None:
        self.counts.update({f"{kind}/{fate}": count for kind, count in counts.items() if count})


def balance_report(counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The counts of a run for `report.json`, by kind and fate."""
    report: dict[str, dict[str, Any]] = {
        kind: {"found": counts.get(f"{kind}/found", 0), "stored": counts.get(f"{kind}/stored", 0)} for kind in KINDS
    }
    for kind in KINDS:
        for fate in ("rejected", "left_out"):
            start = f"{kind}/{fate}/"
            report[kind][fate] = {
                key.removeprefix(start): count for key, count in sorted(counts.items()) if key.startswith(start)
            }
    return report


def balance_lines(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The balance for people; kinds that the input does not hold are left out."""
    lines = []
    for kind in KINDS:
        entry = report[kind]
        if not entry["found"]:
            continue
        parts = [f"{entry['stored']} stored"]
        for fate in ("rejected", "left_out"):
            if entry[fate]:
                reasons = ", ".join(f"{reason} {count}" for reason, count in entry[fate].items())
                parts.append(f"{sum(entry[fate].values())} {fate.replace('_', ' ')} ({reasons})")
        lines.append(f"{kind}: {entry['found']} found = {' + '.join(parts)}")
    return lines


def check_balance(report: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DataError where something of the input is neither stored nor rejected nor left out."""
    for kind, entry in report.items():
        known = entry["stored"] + sum(entry["rejected"].values()) + sum(entry["left_out"].values())
        if known != entry["found"]:
            raise DataError(
                f"balance: the input holds {entry['found']} {kind}, but {known} are stored, rejected or left out; this "
                "is a fault of preprocessing, please report it with report.json"
            )
