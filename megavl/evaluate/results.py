"""Every result of a report as one line: a share with its interval, for the page and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megavl.evaluate.bits_per_byte import ScoredPassage
from megavl.evaluate.interval import bootstrap, wilson
from megavl.evaluate.report import Report

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure from 0 to 1, and what it is compared with."""

    name: str
    measure: str
    """What is measured: accuracy, exact answers, F1 or a grade."""
    value: float | None
    """None where it could not be measured."""
    interval: tuple[float, float] | None
    interval_kind: str
    n: int
    chance: float | None = None
    failed: int | None = None
    """Answers that no parser could read."""
    points: float = 100.0
    """Of a value of 1."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """What the paper reports, in points."""


_MEASURES = {"mmbench": "circular accuracy", "mmbench-cn": "circular accuracy", "pope": "F1", "mm-vet": "grade"}
_MEASURES["ocrbench"] = "right of 1000"


def results(report: Report) -> Iterator[Result]:
    """Choices and free-form answers of each kind, then benchmarks."""
    for kind, answers in _by_kind([(one.entry.kind, one) for one in report.answers]).items():
        right = sum(one.right for one in answers)
        chance = sum(1 / len(one.entry.choices) for one in answers) / len(answers)
        yield _share(kind, "accuracy", right=right, count=len(answers), chance=chance)
    for kind, texts in _by_kind([(one.entry.kind, one) for one in report.free_form]).items():
        yield _share(kind, "exact answers", right=sum(one.exact for one in texts), count=len(texts))
    for one in report.benchmarks:
        figures = one.figures
        yield Result(
            name=one.benchmark.title,
            measure=_MEASURES.get(one.name, "accuracy") + (" by perplexity" if one.mode == "perplexity" else ""),
            value=figures["score"],
            interval=None if figures["interval"] is None else (figures["interval"][0], figures["interval"][1]),
            interval_kind=figures["interval_kind"],
            n=figures["n"],
            chance=figures["chance"],
            failed=figures["failed_parses"],
            points=one.benchmark.points,
            paper=one.benchmark.paper,
        )


def bits_per_byte(passages: Sequence[ScoredPassage]) -> float:
    """Over all texts."""
    return sum(one.bits for one in passages) / sum(one.text_bytes for one in passages)


def text_results(report: Report) -> Iterator[tuple[str, float, tuple[float, float], int]]:
    """Name, bits per byte, bootstrap interval and number of texts of each kind."""
    for kind, passages in _by_kind([(one.entry.kind, one) for one in report.passages]).items():
        yield kind, bits_per_byte(passages), bootstrap(passages, bits_per_byte), len(passages)


def _share(name: str, measure: str, *, right: int, count: int, chance: float | None = None) -> Result:
    return Result(
        name=name,
        measure=measure,
        value=right / count,
        interval=wilson(right, count),
        interval_kind="Wilson",
        n=count,
        chance=chance,
    )


def _by_kind(found: Sequence[tuple[str, T]]) -> dict[str, list[T]]:
    kinds: dict[str, list[T]] = {}
    for kind, one in found:
        kinds.setdefault(kind, []).append(one)
    return dict(sorted(kinds.items()))
