"""What all reports of the benchmarks share: where they are written, what they name, and how tables look."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.bench.programs import ROOT

RESULTS = ROOT / "launch/bench/results"


def hardware() -> str:
    """Processor and number of cores, for names of files."""
    return f"{platform.machine()}-{os.cpu_count()}cores"


def machine() -> str:
    """The same for people."""
    return f"{os.cpu_count()} cores ({platform.machine()})"


def versions(*packages: str) -> str:
    """Versions of Python and of packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def table_row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(head: str, rows: Iterable[str]) -> list[str]:
    """Lines of a table, with an empty line before it; `head` as in Markdown."""
    return ["", head, "|---" * (head.count("|") - 1) + "|", *rows]


def report_path(theme: str, *, where: str | None = None, folder: Path = RESULTS) -> Path:
    """The report's file: theme, hardware and month.

    Args:
        where: the hardware; None for this machine's processor, empty where the report does not depend on it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = (theme, hardware() if where is None else where, time.strftime("%Y%m"))
    return folder / f"{'_'.join(filter(None, parts))}.md"


def write_report(path: Path, lines: Iterable[str]) -> None:
    """Write and print a report, and where it lies."""
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(text, encoding="utf-8")
    print(f"{text}\n{path}")
