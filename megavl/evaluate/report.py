"""What an evaluation found: a table for people, a mapping for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megavl.evaluate.task import Question


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question and the perplexity of each of its choices."""

    question: Question
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
        return self.prediction == self.question.answer

    @property
    def blind_right(self) -> bool | None:
        """The same with wrong images."""
        if self.blind_perplexities is None:
            return None
        return _lowest(self.blind_perplexities) == self.question.answer


@dataclass(frozen=True, kw_only=True)
class Report:
    """All questions of an evaluation."""

    answers: tuple[Answered, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: accuracy, blind (null when not measured), chance, n, by_kind, questions."""
        kinds = self._by_kind()
        return {
            **_figures(self.answers),
            "by_kind": {kind: _figures(answers) for kind, answers in kinds.items()},
            "questions": [_line(answered) for answered in self.answers],
        }

    def table(self) -> str:
        """Rows of kind, n, accuracy, blind, chance; the last row is over all questions."""
        rows: list[tuple[str, ...]] = [("kind", "n", "accuracy", "blind", "chance")]
        for name, answers in [*self._by_kind().items(), ("all", list(self.answers))]:
            figures = _figures(answers)
            shares = ("-" if figures[key] is None else f"{figures[key]:.3f}" for key in rows[0][2:])
            rows.append((name, str(figures["n"]), *shares))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        return "\n".join(lines)

    def _by_kind(self) -> dict[str, list[Answered]]:
        kinds: dict[str, list[Answered]] = {}
        for answered in self.answers:
            kinds.setdefault(answered.question.kind, []).append(answered)
        return dict(sorted(kinds.items()))


def _figures(answers: Sequence[Answered]) -> dict[str, Any]:
    blind = [answered.blind_right for answered in answers if answered.blind_right is not None]
    return {
        "accuracy": sum(answered.right for answered in answers) / len(answers),
        "blind": sum(blind) / len(blind) if blind else None,
        "chance": sum(1 / len(answered.question.choices) for answered in answers) / len(answers),
        "n": len(answers),
    }


def _line(answered: Answered) -> dict[str, Any]:
    question = answered.question
    return {
        "id": question.id,
        "kind": question.kind,
        "answer": question.answer,
        "prediction": answered.prediction,
        "perplexities": list(answered.perplexities),
        "blind_perplexities": None if answered.blind_perplexities is None else list(answered.blind_perplexities),
    }


def _lowest(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
