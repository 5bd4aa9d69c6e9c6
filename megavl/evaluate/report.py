"""What an evaluation found: tables for people, a mapping for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megavl.evaluate.bits_per_byte import Read
from megavl.evaluate.free_form import Written
from megavl.evaluate.task import Entry, Question


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question and the perplexity of each of its choices."""

    entry: Question
    perplexities: tuple[float, ...]
    blind_perplexities: tuple[float, ...] | None = None
    """With another question's images; None without `--blind` or without an image."""

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
        """The same with wrong images."""
        if self.blind_perplexities is None:
            return None
        return _lowest(self.blind_perplexities) == self.entry.answer


@dataclass(frozen=True, kw_only=True)
class Report:
    """All entries of an evaluation."""

    answers: tuple[Answered, ...] = ()
    written: tuple[Written, ...] = ()
    read: tuple[Read, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for what was asked: figures of choices, then `written` and `text` with figures of their own.

        Choices: accuracy, blind (null when not measured), chance, n, by_kind, questions. Written: exact, contains, n,
        by_kind, questions. Text: bits_per_byte, bytes, tokens, n, by_kind, texts.
        """
        found: dict[str, Any] = {}
        if self.answers:
            found |= {**_sums(self.answers, _figures), "questions": [_line(answered) for answered in self.answers]}
        if self.written:
            lines = [_written_line(one) for one in self.written]
            found["written"] = {**_sums(self.written, _written_figures), "questions": lines}
        if self.read:
            lines = [{"id": one.entry.id, "kind": one.entry.kind, **_read_figures([one])} for one in self.read]
            found["text"] = {**_sums(self.read, _read_figures), "texts": lines}
        return found

    def table(self) -> str:
        """A table for each way of asking; the last row of each is over all its entries."""
        tables = (
            _table(self.answers, _figures, ("accuracy", "blind", "chance")),
            _table(self.written, _written_figures, ("exact", "contains")),
            _table(self.read, _read_figures, ("bits_per_byte", "bytes", "tokens")),
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


def _written_figures(found: Sequence[Written]) -> dict[str, Any]:
    return {
        "exact": sum(one.exact for one in found) / len(found),
        "contains": sum(one.contains for one in found) / len(found),
        "n": len(found),
    }


def _written_line(written: Written) -> dict[str, Any]:
    question = written.entry
    return {
        "id": question.id,
        "kind": question.kind,
        "answers": list(question.answers),
        "text": written.text,
        "exact": written.exact,
        "contains": written.contains,
    }


def _read_figures(found: Sequence[Read]) -> dict[str, Any]:
    size = sum(one.text_bytes for one in found)
    return {
        "bits_per_byte": sum(one.bits for one in found) / size,
        "bytes": size,
        "tokens": sum(one.tokens for one in found),
        "n": len(found),
    }


def _lowest(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
