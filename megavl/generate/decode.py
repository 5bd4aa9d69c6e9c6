"""Answers to many prompts: each prompt in one pass, then one token of every unfinished answer at a time.

A prompt runs alone, exactly as in training. Answers share the matrix products of a step. A row whose answer ends takes
the next prompt. The rows in use always come first, so nothing is computed for ended answers.

Legend: I images, C canvas side in pixels, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megavl.generate.engine import Engine
from megavl.generate.sampling import Sampling, choose, likeliest
from megavl.generate.stop import StopTexts
from megavl.model.vl_model import DeepseekVL

GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to answer it; the same on every rank."""

    ids: Sequence[int]
    images: torch.Tensor | None = None
    """uint8 (I, 3, C, C) in the order of their positions; read on the ranks of the first stage only."""
    max_new_tokens: int
    """Most tokens to give, at least 1."""
    sampling: Sampling = GREEDY
    stop: StopTexts | None = None
    """Texts that end the answer too; its last token may reach beyond the text."""


@dataclass(kw_only=True)
class _Answer:
    """An unfinished answer; its index in the list of answers is its row in the cache."""

    number: int
    request: Request
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    present: set[int] = field(default_factory=set)
    stopped: bool = False
    """Whether a stop text was reached."""

    def choose(self, logits: torch.Tensor) -> int:
        return choose(logits, sampling=self.request.sampling, generator=self.generator, present=self.present)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.present.add(token)
        self.stopped = self.request.stop is not None and self.request.stop.reached(self.tokens)

    def ended(self, ends: Collection[int]) -> bool:
        return self.stopped or self.tokens[-1] in ends or len(self.tokens) == self.request.max_new_tokens


def generate(
    model: DeepseekVL, requests: Iterable[Request], *, eos_id: int | Collection[int], rows: int = 1, length: int = 0
) -> Iterator[tuple[int, int, bool]]:
    """Tokens as they are chosen; an answer ends with the end-of-sentence token, at a stop text, or at its limit.

    Args:
        model: this rank's stage, in eval mode; every rank must make the same call and read it to its end.
        requests: prompts; one is fetched when a row is free for it.
        eos_id: the id, or each of the ids, that ends an answer.
        rows: most answers in progress at a time.
        length: tokens of the longest prompt with its answer, if known; the cache gets that size at once.

    Yields:
        Index of the request, token, and whether it is the answer's last one.

    Raises:
        NumericsError: the model's logits are not finite.
    """
    ends = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    engine = Engine(model, rows=rows)
    engine.cache.reserve(length)
    waiting = enumerate(requests)
    answers: list[_Answer] = []
    while True:
        fresh, logits = _start(engine, waiting, begun=len(answers), rows=rows)
        yield from _choose(engine, fresh, logits, ends=ends)
        answers += fresh
        _drop_ended(engine, answers, ends=ends)
        if answers:
            found = engine.append([answer.tokens[-1] for answer in answers])
            yield from _choose(engine, answers, found, ends=ends)
            _drop_ended(engine, answers, ends=ends)
        elif not fresh:
            return


def _start(
    engine: Engine, waiting: Iterator[tuple[int, Request]], *, begun: int, rows: int
) -> tuple[list[_Answer], torch.Tensor | None]:
    """Read prompts into the free rows, so that several prompts fill the pipeline at once."""
    fresh: list[_Answer] = []
    logits: list[torch.Tensor] = []
    for row in range(begun, rows):
        number, request = next(waiting, (-1, None))
        if request is None:
            break
        engine.cache.reserve(len(request.ids) + request.max_new_tokens)
        found = engine.extend(row, request.ids, images=request.images)
        fresh.append(
            _Answer(
                number=number,
                request=request,
                generator=request.sampling.generator(),
                present=set(request.ids),
            )
        )
        if found is not None:
            logits.append(found)
    return fresh, torch.cat(logits) if logits else None


def _choose(
    engine: Engine, answers: Sequence[_Answer], logits: torch.Tensor | None, *, ends: Collection[int]
) -> Iterator[tuple[int, int, bool]]:
    if not answers:
        return

    def pick() -> list[int]:
        assert logits is not None, "the chooser is on the last stage"
        if all(answer.request.sampling.plain for answer in answers):
            return likeliest(logits)
        return [answer.choose(row) for answer, row in zip(answers, logits, strict=True)]

    tokens = engine.agree(pick, count=len(answers))
    for answer, token in zip(answers, tokens):
        answer.add(token)
    for answer, token in zip(answers, tokens):
        yield answer.number, token, answer.ended(ends)


def _drop_ended(engine: Engine, answers: list[_Answer], *, ends: Collection[int]) -> None:
    for row in reversed(range(len(answers))):
        if answers[row].ended(ends):
            last = len(answers) - 1
            engine.cache.move(last, row)
            answers[row] = answers[last]
            answers.pop()
