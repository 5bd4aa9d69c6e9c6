"""Options and fixtures that any test may use: measured numbers in the summary, and rewriting of golden files."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import megavl.config.releases  # noqa: F401  # before megatron-core
from tests.tiny_run import build_dataset

# Machines are shared: an example that takes long says nothing about the code.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

_PROPERTY = "report_table"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset that tests of training runs share."""
    return build_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Import all tests without garbage collections, and spare later ones what was imported, which stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files with what this run measures (make golden)"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten instead of compared with."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def report_table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it with lines of text, or with sequences of cells; the run's summary prints them under the test's name.

    Cells of one call are aligned in columns; floats are written with three significant digits.
    """

    def add(*rows: Any) -> None:
        # User properties travel from pytest-xdist's workers to the process that prints the summary.
        request.node.user_properties.extend((_PROPERTY, line) for line in _lines(rows))

    return add


def _lines(rows: tuple[Any, ...]) -> list[str]:
    tables = [[_cell(value) for value in row] for row in rows if not isinstance(row, str)]
    columns = max((len(row) for row in tables), default=0)
    widths = [max(len(row[i]) for row in tables if i < len(row)) for i in range(columns)]
    aligned = iter(["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in tables])
    return [row if isinstance(row, str) else next(aligned) for row in rows]


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", None) == "call"]
    tables = {r.nodeid: [line for name, line in r.user_properties if name == _PROPERTY] for r in reports}
    tables = {test: lines for test, lines in sorted(tables.items()) if lines}
    if tables:
        terminalreporter.section("measured")
    for test, lines in tables.items():
        terminalreporter.write_line(test)
        for line in lines:
            terminalreporter.write_line(f"  {line}")
