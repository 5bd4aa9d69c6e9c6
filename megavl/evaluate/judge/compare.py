"""Asks a judge about all pairs of answers, in both orders, and counts what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavl.evaluate.endpoint import Endpoint
from megavl.evaluate.judge.answers import Compared
from megavl.evaluate.judge.verdict import ORDERS, SYSTEM, Verdict, combine, prompt, read_verdict
from megavl.evaluate.ledger import Ledger
from megavl.files.hashing import file_sha256

DRAWS = 10_000
"""Of the bootstrap over questions."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One question: the verdicts of both orders, and errors where there is none."""

    id: str
    category: str
    verdicts: tuple[Verdict | None, ...]
    errors: tuple[str, ...]
    """Empty texts where there is a verdict."""

    @property
    def verdict(self) -> Verdict | None:
        """Of both orders together; None after an error."""
        known = [one for one in self.verdicts if one is not None]
        return combine(known) if len(known) == len(self.verdicts) else None

    @property
    def consistent(self) -> bool:
        """Whether both orders say the same."""
        return self.verdict is not None and len(set(self.verdicts)) == 1


def judge_answers(
    questions: Sequence[Compared],
    endpoint: Endpoint,
    *,
    ledger: Ledger,
    workers: int = 4,
    progress: Callable[[int], object] = lambda _: None,
) -> list[Judged]:
    """Ask about every question in both orders; a verdict that the ledger has is not asked for again.

    Args:
        workers: requests at a time.
        progress: told the number of verdicts and errors that came.

    Raises:
        StorageError: the ledger cannot be written.
    """
    wanted = [(one, first) for one in questions for first in ORDERS]
    missing = [(one, first) for one, first in wanted if ledger.get(_key(one, first)) is None]
    progress(len(wanted) - len(missing))
    errors: dict[str, str] = {}
    prompts = [prompt(one, first=first) for one, first in missing]
    for number, reply in endpoint.ask_all(prompts, workers=workers):
        one, first = missing[number]
        verdict = read_verdict(reply.text, first=first) if reply.text else None
        if verdict is None:
            errors[_key(one, first)] = reply.error or f"no verdict in the reply: {reply.text[-200:]!r}"
        else:
            ledger.put(_key(one, first), {"id": one.id, "first": first, "verdict": verdict, "reply": reply.text})
        progress(1)
    return [
        Judged(
            id=one.id,
            category=one.category,
            verdicts=tuple((ledger.get(_key(one, first)) or {}).get("verdict") for first in ORDERS),
            errors=tuple(errors.get(_key(one, first), "") for first in ORDERS),
        )
        for one in questions
    ]


def identity(questions: Sequence[Compared], *, judge: str, url: str) -> dict[str, Any]:
    """What verdicts in a folder must be about to be used again; images count by their content."""
    asked = [[one.id, one.question, one.answers, [file_sha256(image) for image in one.images]] for one in questions]
    digest = hashlib.sha256(json.dumps([asked, SYSTEM]).encode()).hexdigest()
    return {"judge": judge, "endpoint": url, "questions": digest}


def figures(judged: Sequence[Judged], *, seed: int = 0) -> dict[str, Any]:
    """Counts of verdicts, and the first model's score: wins and half of the ties, over the questions with a verdict.

    The interval of 95% is a paired bootstrap: questions are drawn with both answers.
    """
    counts = {name: sum(one.verdict == name for one in judged) for name in ("A", "tie", "B")}
    n = sum(counts.values())
    found: dict[str, Any] = {
        **counts,
        "n": n,
        "errors": len(judged) - n,
        "consistent": sum(one.consistent for one in judged) / n if n else None,
        "score": None,
        "interval": None,
    }
    if n:
        shares = np.array(list(counts.values())) / n
        # Drawing n questions with replacement draws the three counts from a multinomial distribution.
        draws = np.random.default_rng(seed).multinomial(n, shares, size=DRAWS)
        scores = draws @ np.array([1.0, 0.5, 0.0]) / n
        found["score"] = float(shares @ np.array([1.0, 0.5, 0.0]))
        found["interval"] = [float(end) for end in np.quantile(scores, (0.025, 0.975))]
    return found


def by_category(judged: Sequence[Judged], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`figures` of each category, where questions have some, in the order in which they come."""
    names = list(dict.fromkeys(one.category for one in judged if one.category))
    return {name: figures([one for one in judged if one.category == name], seed=seed) for name in names}


def report(judged: Sequence[Judged], *, about: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Everything as a mapping for JSON: `all`, `by_category`, every question, and every error."""
    return {
        **about,
        "all": figures(judged, seed=seed),
        "by_category": by_category(judged, seed=seed),
        "questions": [
            {"id": one.id, "category": one.category, "verdict": one.verdict, "orders": list(one.verdicts)}
            for one in judged
        ],
        "errors": [
            {"id": one.id, "first": first, "error": error}
            for one in judged
            for first, error in zip(ORDERS, one.errors)
            if error
        ],
    }


def _key(one: Compared, first: int) -> str:
    return f"verdict/{one.id}/{first}"
