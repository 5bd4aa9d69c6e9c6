"""Answers in OpenAI's form: text, reasons to finish, log-probabilities, and numbers of tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from megavl.generate.decode import Chosen, Request
from megavl.generate.likelihood import Likelihood
from megavl.generate.pretrained import Processor
from megavl.generate.stream import TextStream
from megavl.serve.token_texts import TokenTexts

_CONTEXT = 8
"""Tokens of the prompt that tell how the first token of an answer reads."""

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A token with its log-probability."""

    label: str
    offset: int
    """Character of the choice's text at which it begins."""
    log_prob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: dict[str, float] = field(default_factory=dict)
    """The likeliest tokens, falling."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a token adds to an answer."""

    text: str
    entries: Sequence[Entry] = ()
    finish: Finish | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.entries or self.finish)


class Reply:
    """The answer to one prompt while its tokens arrive."""

    def __init__(self, request: Request, processor: Processor, *, strip: bool, echo: str | None = None) -> None:
        """No tokens yet.

        Args:
            strip: leave white space around the answer out.
            echo: text of the prompt, which then begins the answer.
        """
        self.request, self._processor, self._echo = request, processor, echo
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._stream = TextStream(processor.tokenizer, strip=strip, stop=request.stop)
        self._texts = TokenTexts(processor.tokenizer)
        self._offset, self._begun = 0, False

    def add(self, chosen: Chosen) -> Piece:
        """What the next token adds."""
        text, entries = self._begin(chosen.prompt)
        if chosen.token is not None:
            self.ids.append(chosen.token)
            if chosen.likelihood is not None:
                entries.append(self._entry(chosen.token, chosen.likelihood))
            text += self._stream.add(chosen.token)
        if chosen.last:
            text += self._stream.end()
            self.finish = "stop" if self._stopped() else "length"
        return Piece(text=text, entries=entries, finish=self.finish)

    def interrupt(self) -> Piece:
        """End an answer for which there is no more time."""
        self.finish = "length"
        return Piece(text=self._stream.end(), finish="length")

    def _begin(self, likelihoods: Sequence[Likelihood]) -> tuple[str, list[Entry]]:
        if self._begun:
            return "", []
        self._begun = True
        if not self.request.score_prompt:
            for token in self.request.ids[-_CONTEXT:]:
                self._texts.add(token)
            entries = []
        else:
            pairs = zip(self.request.ids, (None, *likelihoods), strict=True)
            entries = [self._entry(token, likelihood) for token, likelihood in pairs]
        self._offset = len(self._echo or "")
        return self._echo or "", entries

    def _entry(self, token: int, likelihood: Likelihood | None) -> Entry:
        pairs = {} if likelihood is None else {**dict(likelihood.top), token: likelihood.log_prob}
        labels = self._texts.labels(dict.fromkeys((token, *pairs)))
        entry = Entry(
            label=labels[token],
            offset=self._offset,
            log_prob=None if likelihood is None else likelihood.log_prob,
            top={labels[one]: value for one, value in pairs.items()},
        )
        self._offset += len(self._texts.add(token))
        return entry

    def _stopped(self) -> bool:
        stop = self.request.stop
        return bool(self.ids) and (
            self.ids[-1] in self._processor.end_ids or (stop is not None and stop.reached(self.ids))
        )


class ChatForm:
    """`chat.completion`, and its chunks."""

    def __init__(self, model: str) -> None:
        """A new answer of the model with this name."""
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer, from the pieces of its only choice."""
        (parts,) = pieces
        entries = [entry for piece in parts for entry in piece.entries]
        message = {"role": "assistant", "content": "".join(piece.text for piece in parts), "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _chat_logprobs(entries),
            "finish_reason": parts[-1].finish,
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def first(self) -> dict[str, Any] | None:
        """The chunk that comes before every text."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        return self._chunk({"content": piece.text} if piece.text or not piece.finish else {}, piece)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, if it is asked for."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(self, delta: dict[str, str], piece: Piece | None = None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": _chat_logprobs(piece.entries if piece else ()),
            "finish_reason": piece.finish if piece else None,
        }
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


class CompletionForm:
    """`text_completion`, and its chunks."""

    def __init__(self, model: str) -> None:
        """A new answer of the model with this name."""
        head = {"id": f"cmpl-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._head = {**head, "object": "text_completion"}

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer, from the pieces of each choice."""
        choices = []
        for index, parts in enumerate(pieces):
            joined = Piece(
                text="".join(piece.text for piece in parts),
                entries=[entry for piece in parts for entry in piece.entries],
                finish=parts[-1].finish,
            )
            choices.append(self._choice(index, joined))
        return {**self._head, "choices": choices, "usage": usage}

    def first(self) -> dict[str, Any] | None:
        """Nothing comes before the text."""
        return None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        return {**self._head, "choices": [self._choice(index, piece)]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, if it is asked for."""
        return {**self._head, "choices": [], "usage": usage}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        entries, logprobs = piece.entries, None
        if entries:
            logprobs = {
                "tokens": [entry.label for entry in entries],
                "token_logprobs": [entry.log_prob for entry in entries],
                "top_logprobs": [None if entry.log_prob is None else entry.top for entry in entries],
                "text_offset": [entry.offset for entry in entries],
            }
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}


def usage_of(replies: Sequence[Reply]) -> dict[str, int]:
    """Numbers of tokens of an answer with all its choices."""
    prompt, answer = sum(len(reply.request.ids) for reply in replies), sum(len(reply.ids) for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any] | None:
    if not entries:
        return None
    content = [
        {**_labelled(entry.label, entry.log_prob), "top_logprobs": [_labelled(*pair) for pair in entry.top.items()]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _labelled(label: str, log_prob: float | None) -> dict[str, Any]:
    raw = None if label.startswith("token_id:") else list(label.encode())
    return {"token": label, "logprob": log_prob, "bytes": raw}
