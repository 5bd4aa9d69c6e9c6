"""The results of an evaluation, as tables for people and as a mapping for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megavl.evaluate.bits_per_byte import ScoredPassage
from megavl.evaluate.free_form import FreeFormAnswer
from megavl.evaluate.task import Entry, Question


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question and the perplexity of each of its choices."""

    entry: Question
    perplexities: tuple[float, ...]
    blind_perplexities: tuple[float, ...] | None = None
    """With shuffled images; None without `--blind` or without an image."""

    @property
    def prediction(self) -> int:
        """Index of the choice of lowest perplexity."""
        return _lowest(self.perplexities)

    @property
    def right(self) -> bool:
        """Whether the prediction is the answer."""
        return self.prediction == self.entry.answer

    @property
    def blind_right(self) -> bool | None:
        """The same with shuffled images."""
        if self.blind_perplexities is None:
            return None
        return _lowest(self.blind_perplexities) == self.entry.answer


@dataclass(frozen=True, kw_only=True)
class Report:
    """All entries of an evaluation."""

    answers: tuple[Answered, ...] = ()
    free_form: tuple[FreeFormAnswer, ...] = ()
    passages: tuple[ScoredPassage, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON with what was asked: figures of choices, then `written` and `text` with their own.

        Choices: accuracy, blind (null when not measured), chance, n, by_kind, questions. `written` has the free-form
        answers: exact, contains, n, by_kind, questions. `text`: bits_per_byte, bytes, tokens, n, by_kind, texts.
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
        return found

    def table(self) -> str:
        """A table for choices, free-form answers and texts each; its last row is over all kinds."""
        tables = (
            _table(self.answers, _figures, ("accuracy", "blind", "chance")),
            _table(self.free_form, _free_form_figures, ("exact", "contains")),
            _table(self.passages, _passage_figures, ("bits_per_byte", "bytes", "tokens")),
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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(lines)


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
    question = answered.entry
    return {
        "id": question.id,
        "kind": question.kind,
        "answer": question.answer,
        "prediction": answered.prediction,
        "perplexities": list(answered.perplexities),
        "blind_perplexities": None if answered.blind_perplexities is None else list(answered.blind_perplexities),
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


def _lowest(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
