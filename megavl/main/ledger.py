"""The answers of an evaluation that is repeated into the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavl.main.ranks import is_speaker

if TYPE_CHECKING:
    from megavl.evaluate.ledger import Ledger


def open_ledger(folder: Path | None, *, identity: Callable[[], dict[str, Any]]) -> Ledger:
    """The answers that are there already, the same on every rank; rank 0 adds to them."""
    from megavl.checkpoint import collective_errors
    from megavl.evaluate.ledger import Ledger, read_answers

    if folder is None:
        return Ledger()
    path = folder / "answers.jsonl"
    answers = collective_errors.on_rank_zero(lambda: read_answers(path, identity=identity()))
    return Ledger(answers, path=path if is_speaker() else None)
