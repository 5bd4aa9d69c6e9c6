"""The results of an evaluation, as tables for people and as a mapping for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megavl.config.evaluation import Normalization
from megavl.evaluate.benchmarks.report import BenchmarkReport, aligned, benchmark_table
from megavl.evaluate.bits_per_byte import ScoredPassage
from megavl.evaluate.free_form import FreeFormAnswer
from megavl.evaluate.normalize import cost
from megavl.evaluate.task import Entry, Question
from megavl.generate.score import Score


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question and the score of each of its choices."""

    entry: Question
    scores: tuple[Score, ...]
    blind_scores: tuple[Score, ...] | None = None
    """With shuffled images; None without `--blind` or without an image."""
    normalize: Normalization = "token"

    @property
    def perplexities(self) -> tuple[float, ...]:
        """Of each choice."""
        return tuple(score.perplexity for score in self.scores)

    @property
    def blind_perplexities(self) -> tuple[float, ...] | None:
        """Of each choice, with shuffled images."""
        return None if self.blind_scores is None else tuple(score.perplexity for score in self.blind_scores)

    @property
    def prediction(self) -> int:
        """Index of the choice that costs least."""
        return self._least(self.scores)

    @property
    def right(self) -> bool:
        """Whether the prediction is the answer."""
        return self.prediction == self.entry.answer

    @property
    def blind_right(self) -> bool | None:
        """The same with shuffled images."""
        return None if self.blind_scores is None else self._least(self.blind_scores) == self.entry.answer

    def _least(self, scores: Sequence[Score]) -> int:
        costs = [cost(one, choice, normalize=self.normalize) for one, choice in zip(scores, self.entry.choices)]
        return costs.index(min(costs))


@dataclass(frozen=True, kw_only=True)
class Report:
    """All entries of an evaluation."""

    answers: tuple[Answered, ...] = ()
    free_form: tuple[FreeFormAnswer, ...] = ()
    passages: tuple[ScoredPassage, ...] = ()
    benchmarks: tuple[BenchmarkReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON with what was asked: figures of choices, then `written` and `text` with their own.

        Choices: accuracy, blind (null when not measured), chance, n, by_kind, questions. `written` has the free-form
        answers: exact, contains, n, by_kind, questions. `text`: bits_per_byte, bytes, tokens, n, by_kind, texts.
        `benchmarks`: of each its figures and questions.
        """
        found: dict[str, Any] = {}
        if self.answers:
            found |= {**_sums(self.answers, _figures), "questions": [_line(answered) for answered in self.answers]}
        if self.free_form:
            lines = [_free_form_line(one) for one in self.free_form]
            found["written"] = {**_sums(self.free_form, _free_form_figures), "questions": lines}
        if self.passages:
            lines = [{"id": one.entry.id, "kind": one.entry.kind, **_passage_figures([one])} for one in self.passages]
            found["text"] = {**_sums(self.passages, _passage_figures), "texts": lines}
        if self.benchmarks:
            found["benchmarks"] = {one.name: one.to_dict() for one in self.benchmarks}
        return found

    def table(self) -> str:
        """A table for choices, free-form answers and texts each; its last row is over all kinds."""
        tables = (
            _table(self.answers, _figures, ("accuracy", "blind", "chance")),
            _table(self.free_form, _free_form_figures, ("exact", "contains")),
            _table(self.passages, _passage_figures, ("bits_per_byte", "bytes", "tokens")),
            benchmark_table(self.benchmarks),
        )
        return "\n\n".join(filter(None, tables))


class _OfEntry(Protocol):
    @property
    def entry(self) -> Entry: ...


_Found = TypeVar("_Found", bound=_OfEntry)
_Figures = Callable[[Sequence[_Found]], dict[str, Any]]


def _sums(found: Sequence[_Found], figures: _Figures[_Found]) -> dict[str, Any]:
    return {**figures(found), "by_kind": {kind: figures(of_kind) for kind, of_kind in _by_kind(found).items()}}


def _table(found: Sequence[_Found], figures: _Figures[_Found], columns: tuple[str, ...]) -> str:
    if not found:
        return ""
    rows: list[tuple[str, ...]] = [("kind", "n", *columns)]
    for name, of_kind in [*_by_kind(found).items(), ("all", list(found))]:
        values = figures(of_kind)
        rows.append((name, *(_cell(values[key]) for key in rows[0][1:])))
    return aligned(rows)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _by_kind(found: Sequence[_Found]) -> dict[str, list[_Found]]:
    kinds: dict[str, list[_Found]] = {}
    for one in found:
        kinds.setdefault(one.entry.kind, []).append(one)
    return dict(sorted(kinds.items()))


def _figures(answers: Sequence[Answered]) -> dict[str, Any]:
    blind = [answered.blind_right for answered in answers if answered.blind_right is not None]
    return {
        "accuracy": sum(answered.right for answered in answers) / len(answers),
        "blind": sum(blind) / len(blind) if blind else None,
        "chance": sum(1 / len(answered.entry.choices) for answered in answers) / len(answers),
        "n": len(answers),
    }


def _line(answered: Answered) -> dict[str, Any]:
    question, blind = answered.entry, answered.blind_perplexities
    return {
        "id": question.id,
        "kind": question.kind,
        "answer": question.answer,
        "prediction": answered.prediction,
        "perplexities": list(answered.perplexities),
        "blind_perplexities": None if blind is None else list(blind),
        "log_probs": [score.log_prob for score in answered.scores],
    }


def _free_form_figures(found: Sequence[FreeFormAnswer]) -> dict[str, Any]:
    return {
        "exact": sum(one.exact for one in found) / len(found),
        "contains": sum(one.contains for one in found) / len(found),
        "n": len(found),
    }


def _free_form_line(answer: FreeFormAnswer) -> dict[str, Any]:
    question = answer.entry
    return {
        "id": question.id,
        "kind": question.kind,
        "answers": list(question.answers),
        "text": answer.text,
        "exact": answer.exact,
        "contains": answer.contains,
    }


def _passage_figures(found: Sequence[ScoredPassage]) -> dict[str, Any]:
    size = sum(one.text_bytes for one in found)
    return {
        "bits_per_byte": sum(one.bits for one in found) / size,
        "bytes": size,
        "tokens": sum(one.tokens for one in found),
        "n": len(found),
    }
