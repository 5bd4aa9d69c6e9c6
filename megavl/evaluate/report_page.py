"""A report as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megavl.evaluate.report import Report
from megavl.evaluate.results import results, text_results
from megavl.foreign.printing import visible

_EXAMPLES = 3
"""Answers that are shown of each benchmark."""


def page(report: Report, *, about: Mapping[str, Any]) -> str:
    """Results with intervals and the paper's numbers, what to know about them, and a few answers."""
    parts = ["# Evaluation", _lines([f"- {_text(key)}: {_text(value)}" for key, value in about.items()])]
    found = list(results(report))
    if found:
        parts += ["![results](report.svg)", _result_table(found)]
    if texts := list(text_results(report)):
        rows = [
            (name, f"{value:.4f}", f"{low:.4f} to {high:.4f}", str(count)) for name, value, (low, high), count in texts
        ]
        parts.append(_table(("texts", "bits per byte", "95%", "n"), rows))
    notes = [f"- {one.benchmark.title}: {note}." for one in report.benchmarks for note in one.notes]
    intervals = "Intervals of 95% are Wilson's for shares, and else a bootstrap over questions (1000 draws, seed 0)."
    paper = "The paper's numbers are those of DeepSeek-VL (arXiv:2403.05525), Tables 6 and 7."
    parts.append(_lines([intervals, *([paper] if report.benchmarks else []), *([""] if notes else []), *notes]))
    for one in report.benchmarks:
        parts.append(f"## {one.benchmark.title}")
        kinds = one.figures["by_kind"]
        if len(kinds) > 1:
            columns = list(dict.fromkeys(key for figures in kinds.values() for key in figures))
            rows_of_kinds = [(kind, *(_cell(figures.get(key)) for key in columns)) for kind, figures in kinds.items()]
            parts.append(_table(("group", *columns), rows_of_kinds))
        shown = [outcome for outcome in one.outcomes if outcome.score != 1][:_EXAMPLES]
        if shown:
            answers = [
                (item.item.id, " / ".join(item.item.answers) or item.item.answer, item.text, item.prediction or "-")
                for item in shown
            ]
            parts += [
                "Some answers that did not count as right:",
                _table(("id", "right", "answer", "read as"), answers),
            ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _result_table(found: Sequence[Any]) -> str:
    models = list(dict.fromkeys(name for one in found for name in one.paper))
    head = ("task", "measure", "score", "95%", "chance", "failed parses", "n", *(f"paper {name}" for name in models))
    rows = []
    for one in found:

        def points(value: float | None, scale: float = one.points) -> str:
            return "-" if value is None else f"{value * scale:.1f}"

        interval = "-" if one.interval is None else f"{points(one.interval[0])} to {points(one.interval[1])}"
        rows.append(
            (
                one.name,
                one.measure,
                points(one.value),
                interval,
                points(one.chance),
                "-" if one.failed is None else str(one.failed),
                str(one.n),
                *(f"{one.paper[name]:g}" if name in one.paper else "-" for name in models),
            )
        )
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    return _lines(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_text, cells)) + " |"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)


def _text(value: Any) -> str:
    """One line of text that neither a table nor HTML takes for its own."""
    text = visible(" ".join(str(value).split()))
    text = text if len(text) <= 200 else text[:200] + "..."
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(mark, shown)
    return text


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines)
