"""The result of one benchmark, as rows for people and as a mapping for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megavl.evaluate.benchmarks.figures import Figures
from megavl.evaluate.benchmarks.item import Outcome
from megavl.evaluate.benchmarks.table import BENCHMARKS, Benchmark
from megavl.foreign.printing import visible

Mode = Literal["generate", "perplexity"]
"""How a benchmark's questions are asked: the model answers and a parser reads, or its choices are scored."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """What became of all items of a benchmark."""

    name: str
    """Row of `BENCHMARKS`."""
    outcomes: tuple[Outcome, ...]
    mode: Mode
    figures: Figures
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""

    @property
    def benchmark(self) -> Benchmark:
        """The row of the table."""
        return BENCHMARKS[self.name]

    def to_dict(self) -> dict[str, Any]:
        """Figures, notes, what the paper reports, and every question."""
        questions = [
            {
                "id": one.item.id,
                "kind": one.item.kind,
                "reference": list(one.item.answers) or one.item.answer,
                "text": one.text,
                "prediction": one.prediction,
                "score": one.score,
            }
            for one in self.outcomes
        ]
        return {
            "mode": self.mode,
            **self.figures,
            "points": None if self.figures["score"] is None else self.figures["score"] * self.benchmark.points,
            "paper": dict(self.benchmark.paper),
            "notes": list(self.notes),
            "questions": questions,
        }


def in_points(report: BenchmarkReport, value: float | None) -> str:
    """A share in the paper's unit; `-` for none."""
    return "-" if value is None else f"{value * report.benchmark.points:.1f}"


def benchmark_table(reports: Sequence[BenchmarkReport]) -> str:
    """One line for each benchmark, with its interval and the paper's numbers, and the notes below."""
    if not reports:
        return ""
    models = list(dict.fromkeys(name for one in reports for name in one.benchmark.paper))
    rows = [("benchmark", "n", "score", "95%", "chance", "failed", *(f"paper {model}" for model in models))]
    for one in reports:
        interval = one.figures["interval"]
        rows.append(
            (
                one.benchmark.title,
                str(one.figures["n"]),
                in_points(one, one.figures["score"]),
                "-" if interval is None else f"{in_points(one, interval[0])} to {in_points(one, interval[1])}",
                in_points(one, one.figures["chance"]),
                str(one.figures["failed_parses"]),
                *(f"{one.benchmark.paper[model]:g}" if model in one.benchmark.paper else "-" for model in models),
            )
        )
    notes = [f"{one.benchmark.title}: {note}" for one in reports for note in one.notes]
    return "\n".join([aligned(rows), *notes])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    # Names of kinds come from files.
    rows = [[visible(cell, keep="") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
