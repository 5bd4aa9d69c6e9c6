"""Answers that an evaluation already has, and the files that keep them, so that a killed evaluation goes on.

`evaluation.json` says of which model, questions and settings the answers are. `answers.jsonl` has a line for each
answer. Scores with shuffled images, scores of texts and a judge's replies are in files of their own beside it. A line
that a kill left unfinished is dropped, and its question is asked again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megavl.config.errors import UsageError
from megavl.files.durable import replace_durably, storage_errors
from megavl.foreign.reading import open_regular
from megavl.generate.pretrained import Model
from megavl.generate.score import Score
from megavl.generate.score_rows import ScoreRequest

_IDENTITY = "evaluation.json"
_FILES = {"blind": "blind.jsonl", "text": "texts.jsonl", "judge": "replies.jsonl"}
"""Files of answers whose key begins so."""
_SYNC_EVERY = 64
"""Answers after which the file is synced."""

Answer = Mapping[str, Any]


class Ledger:
    """Answers by key; without a path they are kept in memory alone."""

    def __init__(self, answers: Mapping[str, Answer] | None = None, *, path: Path | None = None) -> None:
        """Go on from some answers.

        Args:
            answers: by key, the same on every rank; see `read_answers`.
            path: `answers.jsonl`, to which new answers are appended, on the rank that writes.
        """
        self._answers, self._path = dict(answers or {}), path
        self._unsynced = 0

    def get(self, key: str) -> Answer | None:
        """The answer to a question; None if it was not asked yet."""
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            StorageError: it cannot be written.
        """
        self._answers[key] = answer
        if self._path is None:
            return
        line = json.dumps({"key": key, **answer}, ensure_ascii=False, allow_nan=False) + "\n"
        self._unsynced += 1
        path = self._path.with_name(_FILES.get(key.partition("/")[0], self._path.name))
        with storage_errors(f"{path}: cannot be written"), path.open("ab") as file:
            file.write(line.encode("utf-8", "replace"))
            file.flush()
            if self._unsynced >= _SYNC_EVERY:
                os.fsync(file.fileno())
                self._unsynced = 0


def read_answers(path: Path, *, identity: Mapping[str, Any]) -> dict[str, Answer]:
    """The answers of an interrupted evaluation; begins a new one where there is none.

    Args:
        path: `answers.jsonl`; the other files are beside it.
        identity: of the evaluation.

    Raises:
        StorageError: a file cannot be read or written.
        UsageError: the files are of another evaluation.
    """
    head = path.with_name(_IDENTITY)
    files = [path, *map(path.with_name, _FILES.values())]
    text = json.dumps(identity, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    with storage_errors(f"{head}: cannot be used"):
        if head.exists():
            _check_identity(_parsed(_content(head)), json.loads(text), path=path.parent)
        elif stray := next((one for one in files if one.exists()), None):
            raise UsageError(f"{stray}: has no {_IDENTITY} beside it; give another --out, or remove the file")
        else:
            replace_durably(head, text.encode())
    return {key: answer for one in files for key, answer in _read(one)}


def _read(path: Path) -> Iterator[tuple[str, Answer]]:
    """Keys and answers of a file, which is tidied of lines that are none."""
    with storage_errors(f"{path}: cannot be used"):
        lines = _content(path).split(b"\n") if path.exists() else [b""]
        good = [line for line in lines if isinstance(_parsed(line).get("key"), str)]
        if [*good, b""] != lines:
            replace_durably(path, b"\n".join([*good, b""]))
    for answer in map(_parsed, good):
        yield answer["key"], {name: value for name, value in answer.items() if name != "key"}


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def score_missing(
    model: Model,
    requests: Sequence[ScoreRequest],
    *,
    keys: Sequence[str],
    ledger: Ledger,
    describe: Callable[[int, list[Score]], Answer],
    row_tokens: int,
    progress: Callable[[int], object],
) -> list[list[Score]]:
    """Scores of all requests, of which the model reads those that are not in the ledger.

    Args:
        keys: of the requests.
        describe: what else is kept with a request's scores, by its number.
        progress: told the number of options that are done.

    Raises:
        ImageError, NumericsError, StorageError: as `Model.score_requests` and `Ledger.put`.
    """
    known = [ledger.get(key) for key in keys]
    missing = [number for number, answer in enumerate(known) if answer is None]

    def keep(index: int, scores: list[Score]) -> None:
        if all(math.isfinite(one.log_prob) for one in scores):
            number = missing[index]
            values = [[one.log_prob, one.tokens, one.greedy] for one in scores]
            ledger.put(keys[number], {**describe(number, scores), "scores": values})

    progress(sum(len(request.options) for request, answer in zip(requests, known) if answer is not None))
    found = iter(
        model.score_requests(
            [requests[number] for number in missing], row_tokens=row_tokens, progress=progress, on_scores=keep
        )
    )
    return [next(found) if answer is None else _scores(answer) for answer in known]


def _scores(answer: Answer) -> list[Score]:
    return [Score(log_prob=value, tokens=tokens, greedy=greedy) for value, tokens, greedy in answer["scores"]]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_identity(found: Mapping[str, Any], identity: Mapping[str, Any], *, path: Path) -> None:
    for name in (*identity, *found):
        if found.get(name) != identity.get(name):
            raise UsageError(
                f"{path}: has answers with {name} {found.get(name)!r}, but {name} is {identity.get(name)!r} now; "
                "give another --out, or remove that folder"
            )
