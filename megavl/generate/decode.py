"""Answers to many prompts: each prompt in one pass, then one token of every unfinished answer at a time.

A prompt runs alone, exactly as in training. Answers share the matrix products of a step. A row whose answer ends takes
the next prompt. The rows in use always come first, so nothing is computed for ended answers.

Legend: I images, P tokens per image, H hidden, C canvas side in pixels, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from megavl.generate.engine import Engine
from megavl.generate.likelihood import Likelihood, likelihood_table, read_table
from megavl.generate.sampling import Sampling, choose, likeliest
from megavl.generate.stop import StopTexts
from megavl.model.vl_model import DeepseekVL

GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to answer it; the same on every rank."""

    ids: Sequence[int]
    images: torch.Tensor | None = None
    """uint8 (I, 3, C, C) in the order of their positions, or their embeddings (I, P, H); read on the ranks of the first
    stage only."""
    max_new_tokens: int
    """Most tokens to give; 0 only reads the prompt."""
    sampling: Sampling = GREEDY
    stop: StopTexts | None = None
    """Texts that end the answer too; its last token may reach beyond the text."""
    alternatives: int | None = None
    """Tell how likely each token is, with this many of the likeliest tokens; None does not."""
    score_prompt: bool = False
    """Tell it of the prompt's tokens too; needs `alternatives`."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A token of an answer; the first one brings the scores of the prompt."""

    number: int
    """Of the request."""
    token: int | None
    """None where an answer may have no token."""
    last: bool
    """Whether the answer ends with it."""
    likelihood: Likelihood | None = None
    prompt: tuple[Likelihood, ...] = ()
    """Of the prompt's tokens after the first."""


@dataclass(kw_only=True)
class _Answer:
    """An unfinished answer; its index in the list of answers is its row in the cache."""

    number: int
    request: Request
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    present: set[int] = field(default_factory=set)
    stopped: bool = False
    """Whether a stop text was reached, or the answer is no longer wanted."""

    def choose(self, logits: torch.Tensor) -> int:
        return choose(logits, sampling=self.request.sampling, generator=self.generator, present=self.present)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.present.add(token)
        self.stopped = self.request.stop is not None and self.request.stop.reached(self.tokens)

    def ended(self, ends: Collection[int]) -> bool:
        return self.stopped or len(self.tokens) == self.request.max_new_tokens or self.tokens[-1] in ends


class AnswerBatch:
    """Answers in progress; prompts join and answers leave between steps. Every rank makes the same calls."""

    def __init__(self, model: DeepseekVL, *, eos_id: int | Collection[int], rows: int, length: int = 0) -> None:
        """No answers yet.

        Args:
            model: this rank's stage, in eval mode.
            eos_id: the id, or each of the ids, that ends an answer.
            rows: most answers in progress at a time.
            length: tokens of the longest prompt with its answer, if known; the cache gets that size at once.
        """
        self._ends = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
        self._engine, self._rows = Engine(model, rows=rows), rows
        self._engine.cache.reserve(length)
        self._answers: list[_Answer] = []

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def free(self) -> int:
        """Prompts that can start now."""
        return self._rows - len(self._answers)

    def start(self, requests: Iterable[tuple[int, Request]]) -> list[Chosen]:
        """Read prompts, so that several fill the pipeline at once, and choose the first token of each answer.

        Args:
            requests: numbers of the caller with their requests, at most `free` of them.

        Raises:
            NumericsError: the model's logits are not finite; the batch cannot be used any more.
        """
        fresh: list[_Answer] = []
        logits: list[torch.Tensor] = []
        tables: list[torch.Tensor | None] = []
        for number, request in requests:
            generator = request.sampling.generator()
            fresh.append(_Answer(number=number, request=request, generator=generator, present=set(request.ids)))
            found, table = self._read(len(self._answers) + len(fresh) - 1, request)
            tables.append(table)
            if found is not None:
                logits.append(found)
        scores = [self._scores(answer.request, table) for answer, table in zip(fresh, tables, strict=True)]
        chosen = self._choose(fresh, torch.cat(logits) if logits else None, scores=scores)
        self._answers += fresh
        self._drop_ended()
        return chosen

    def step(self) -> list[Chosen]:
        """One more token of every answer.

        Raises:
            NumericsError: as for `start`.
        """
        if not self._answers:
            return []
        logits = self._engine.append([answer.tokens[-1] for answer in self._answers])
        chosen = self._choose(self._answers, logits)
        self._drop_ended()
        return chosen

    def drop(self, numbers: Collection[int]) -> None:
        """Forget answers that are no longer wanted; numbers without an answer are ignored."""
        for answer in self._answers:
            answer.stopped = answer.stopped or answer.number in numbers
        self._drop_ended()

    def _read(self, row: int, request: Request) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        self._engine.cache.reserve(len(request.ids) + request.max_new_tokens)
        if not request.score_prompt:
            return self._engine.extend(row, request.ids, images=request.images), None
        top = request.alternatives or 0
        return self._engine.extend_scored(row, request.ids, images=request.images, top=top)

    def _scores(self, request: Request, table: torch.Tensor | None) -> tuple[Likelihood, ...]:
        if not request.score_prompt:
            return ()
        shape = (len(request.ids) - 1, 1 + 2 * (request.alternatives or 0))
        return read_table(self._engine.share(table, shape=shape))

    def _choose(
        self,
        answers: Sequence[_Answer],
        logits: torch.Tensor | None,
        *,
        scores: Sequence[tuple[Likelihood, ...]] | None = None,
    ) -> list[Chosen]:
        """Choose a token for each answer that may have one more."""
        going = [row for row, answer in enumerate(answers) if answer.request.max_new_tokens]
        if logits is not None and len(going) < len(answers):
            logits = logits[going]
        tokens, likelihoods = self._next_tokens([answers[row] for row in going], logits)
        chosen = []
        for row, answer in enumerate(answers):
            at = going.index(row) if row in going else None
            if at is not None:
                answer.add(tokens[at])
            chosen.append(
                Chosen(
                    number=answer.number,
                    token=None if at is None else tokens[at],
                    last=answer.ended(self._ends),
                    likelihood=None if at is None else likelihoods[at],
                    prompt=scores[row] if scores else (),
                )
            )
        return chosen

    def _next_tokens(
        self, answers: Sequence[_Answer], logits: torch.Tensor | None
    ) -> tuple[list[int], Sequence[Likelihood | None]]:
        if not answers:
            return [], []

        def pick() -> list[int]:
            assert logits is not None, "the chooser is on the last stage"
            if all(answer.request.sampling.plain for answer in answers):
                return likeliest(logits)
            return [answer.choose(row) for answer, row in zip(answers, logits, strict=True)]

        tokens = self._engine.agree(pick, count=len(answers))
        wanted = [answer.request.alternatives for answer in answers]
        if all(count is None for count in wanted):
            return tokens, [None] * len(tokens)
        top, table = max(count or 0 for count in wanted), None
        if logits is not None:
            table = likelihood_table(logits, torch.tensor(tokens, device=logits.device), top=top)
        found = read_table(self._engine.share(table, shape=(len(tokens), 1 + 2 * top)))
        return tokens, [None if k is None else one.truncated(k) for k, one in zip(wanted, found, strict=True)]

    def _drop_ended(self) -> None:
        for row in reversed(range(len(self._answers))):
            if self._answers[row].ended(self._ends):
                last = len(self._answers) - 1
                self._engine.cache.move(last, row)
                self._answers[row] = self._answers[last]
                self._answers.pop()


def generate(
    model: DeepseekVL, requests: Iterable[Request], *, eos_id: int | Collection[int], rows: int = 1, length: int = 0
) -> Iterator[tuple[int, int, bool]]:
    """Tokens as they are chosen; an answer ends with the end-of-sentence token, at a stop text, or at its limit.

    Args:
        model: this rank's stage, in eval mode; every rank must make the same call and read it to its end.
        requests: prompts of at least one token each to give; one is fetched when a row is free for it.
        eos_id, rows, length: as in `AnswerBatch`.

    Yields:
        Index of the request, token, and whether it is the answer's last one.

    Raises:
        NumericsError: the model's logits are not finite.
    """
    batch = AnswerBatch(model, eos_id=eos_id, rows=rows, length=length)
    waiting = enumerate(requests)
    while True:
        fresh = batch.start(islice(waiting, batch.free))
        yield from _triples(fresh)
        if batch:
            yield from _triples(batch.step())
        elif not fresh:
            return


def _triples(chosen: Iterable[Chosen]) -> Iterator[tuple[int, int, bool]]:
    for one in chosen:
        assert one.token is not None, "every request gets a token"
        yield one.number, one.token, one.last
