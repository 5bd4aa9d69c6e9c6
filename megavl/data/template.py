"""From conversations and documents to token ids with supervised spans.

The "deepseek" template follows the released code (deepseek_vl/utils/conversation.py), not the chat template of the
Hugging Face port, which drops the last EOS. Text between two special tokens is tokenized in one go, so that training
ids equal those of the whole prompt. A token is supervised when its first character is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from megavl.config.chat import IMAGE_TOKEN, SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.data.text_parts import LONG
from megavl.data.tokenizer import Tokenizer

IMAGE_TAG = IMAGE_TOKEN
"""Stands for one image in the text of a turn or a tagged document."""

Template = Literal["deepseek", "plain", "none"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    """With one IMAGE_TAG per image."""
    tags: tuple[int, ...] | None = None
    """Which of its IMAGE_TAGs are images, from 0, where the text spells others; None: all."""
    learned: bool = True
    """Whether an answer is supervised."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a prompt with one kind of content."""

    kind: Literal["bos", "text", "image", "eos"]
    text: str = ""
    supervised: bool = False


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A tokenized sample."""

    ids: npt.NDArray[np.int32]
    """(n,); each image stands as `image_tokens` copies of the image id."""
    spans: tuple[tuple[int, int], ...]
    """Supervised target positions, half open, ascending and apart."""
    images: int


def document_pieces(text: str, *, template: Template, tagged: bool) -> list[Piece]:
    """A document, all of whose text is supervised.

    Args:
        text: the document.
        template: `plain` puts BOS before and a supervised EOS after it (the released "plain" has no EOS; without it
            packed documents would run together); `none` adds nothing.
        tagged: whether IMAGE_TAG stands for an image; otherwise it is ordinary text.
    """
    if template == "deepseek":
        raise DataError("template deepseek needs turns of user and assistant, and a document has none; use plain")
    return framed_document(_split_images(text, supervised=True, tags=None if tagged else ()), template=template)


def conversation_pieces(turns: Sequence[Turn], *, template: Template, system: str = SYSTEM_PROMPT) -> list[Piece]:
    """A conversation for training.

    `deepseek`: BOS, system text and a blank line, then `User: ...`, a blank line, `Assistant: ...` and EOS for each
    round. Each answer is supervised with its leading space and its EOS. An empty answer is `Assistant:` without EOS, as
    in the released text, and nothing of it is supervised. `plain` and `none`: the messages joined, as in
    `document_pieces`.

    Args:
        turns: an optional system turn, then user and assistant in alternation.
        template: row of the table above.
        system: system text where the conversation brings none; empty for none at all. A tag in it is ordinary text.

    Raises:
        DataError: the turns do not alternate, or one of the user is empty.
    """
    if template != "deepseek":
        body = [piece for turn in turns for piece in _split_images(turn.text, supervised=turn.learned, tags=turn.tags)]
        return framed_document(body, template=template)
    return _chat_pieces(turns, system=system, last="assistant")


def inference_prompt(turns: Sequence[Turn], *, system: str = SYSTEM_PROMPT) -> list[Piece]:
    """A conversation whose next message is the assistant's; ends with `Assistant:`, so answers begin with a space.

    Args:
        turns: as in `conversation_pieces`, the last one of the user.
        system: system text where the conversation brings none.

    Raises:
        DataError: the turns do not alternate, or one of the user is empty.
    """
    pieces = _chat_pieces(turns, system=system, last="user")
    return [*(replace(piece, supervised=False) for piece in pieces), Piece(kind="text", text="Assistant:")]


def encode(pieces: Sequence[Piece], *, tokenizer: Tokenizer, image_tokens: int) -> Encoded:
    """Token ids and supervised spans of one sample.

    Args:
        pieces: from one of the functions above.
        tokenizer: gives the ids of text and of special tokens.
        image_tokens: positions of one image.

    Raises:
        DataError: images without an image token in the vocabulary, or text that yields a control token.
    """
    return encode_batch([pieces], tokenizer=tokenizer, image_tokens=image_tokens)[0]


def encode_batch(samples: Sequence[Sequence[Piece]], *, tokenizer: Tokenizer, image_tokens: int) -> list[Encoded]:
    """`encode` for many samples; their texts go through the tokenizer's batch call together, where it allows."""
    runs = [[part for run in _runs(pieces) for part in _divided(run, tokenizer=tokenizer)] for pieces in samples]
    short = [
        run for sample in runs for run in sample if run[0].kind == "text" and _is_uniform(run) and _size(run) <= LONG
    ]
    texts = ["".join(piece.text for piece in run) for run in short]
    ready = {id(run): ids for run, ids in zip(short, tokenizer.encode_similar(texts))}
    return [_assemble(sample, ready, tokenizer=tokenizer, image_tokens=image_tokens) for sample in runs]


def _assemble(
    runs: Iterable[list[Piece]], ready: Mapping[int, Sequence[int]], *, tokenizer: Tokenizer, image_tokens: int
) -> Encoded:
    # One array that grows: the ids of a long document are held once.
    ids = array("i")
    spans: list[tuple[int, int]] = []
    images = 0
    for run in runs:
        kind, start = run[0].kind, len(ids)
        if kind == "text":
            if id(run) in ready:
                ids.extend(ready[id(run)])
            elif _is_uniform(run):
                for part in tokenizer.encode_long("".join(piece.text for piece in run)):
                    ids.extend(part)
            else:
                new, parts = tokenizer.encode_parts([piece.text for piece in run])
                ids.extend(new)
                marks = np.array([piece.supervised for piece in run])[parts]
                spans += [(start + first, start + end) for first, end in _spans(marks)]
                continue
        elif kind == "image":
            if tokenizer.image_id is None:
                raise DataError(f"{tokenizer.path}: no {IMAGE_TOKEN} token; add it to the vocabulary to use images")
            ids.extend(array("i", [tokenizer.image_id]) * image_tokens)
            images += 1
            continue
        else:
            token = tokenizer.bos_id if kind == "bos" else tokenizer.eos_id
            ids.extend([] if token is None else [token])
        if run[0].supervised and len(ids) > start:
            spans.append((start, len(ids)))
    return Encoded(
        ids=np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32), spans=_merged(spans), images=images
    )


def _runs(pieces: Iterable[Piece]) -> Iterable[list[Piece]]:
    """Neighbouring text pieces together, every other piece alone."""
    run: list[Piece] = []
    for piece in pieces:
        if piece.kind == "text":
            if piece.text:
                run.append(piece)
            continue
        if run:
            yield run
        run = []
        yield [piece]
    if run:
        yield run


def _divided(run: list[Piece], *, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """Divide a run where its supervision changes, if the ids stay those of the whole run."""
    if run[0].kind != "text" or _is_uniform(run):
        yield run
        return
    text = "".join(piece.text for piece in run)
    start = position = 0
    for number, (before, after) in enumerate(pairwise(run), start=1):
        position += len(before.text)
        if before.supervised != after.supervised and tokenizer.divides_at(text, position):
            yield run[start:number]
            start = number
    yield run[start:]


def _is_uniform(run: list[Piece]) -> bool:
    return all(piece.supervised == run[0].supervised for piece in run)


def _size(run: list[Piece]) -> int:
    return sum(len(piece.text) for piece in run)


def _spans(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans in order, with adjoining ones as one."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return tuple(merged)


def framed_document(body: list[Piece], *, template: Template) -> list[Piece]:
    """The pieces of a document between the tokens that a template, not `deepseek`, puts around them."""
    return body if template == "none" else [Piece(kind="bos"), *body, Piece(kind="eos", supervised=True)]


def _split_images(text: str, *, supervised: bool, tags: Sequence[int] | None = None) -> list[Piece]:
    """Text and images; `tags` has the numbers of the IMAGE_TAGs that are images, None: all."""
    pieces: list[Piece] = []
    start = position = 0
    for number in range(text.count(IMAGE_TAG)):
        position = text.index(IMAGE_TAG, position)
        if tags is None or number in tags:
            pieces += [Piece(kind="text", text=text[start:position], supervised=supervised), Piece(kind="image")]
            start = position + len(IMAGE_TAG)
        position += len(IMAGE_TAG)
    pieces.append(Piece(kind="text", text=text[start:], supervised=supervised))
    return [piece for piece in pieces if piece.kind == "image" or piece.text]


def _chat_pieces(turns: Sequence[Turn], *, system: str, last: str) -> list[Piece]:
    """BOS, system text, turns; contents and the beginning of the whole text are stripped."""
    rounds = list(turns)
    tags: tuple[int, ...] | None = ()
    if rounds and rounds[0].role == "system":
        first = rounds.pop(0)
        system, tags = first.text, first.tags
    _require_alternation(rounds, last=last)
    for number, turn in enumerate(turns, start=1):
        # The released text would run `User:` into `Assistant:`, without the blank line that the model knows.
        if turn.role == "user" and not turn.text.strip():
            raise DataError(f"turn {number} (user) is empty; give it text or an image")
    pieces = [Piece(kind="bos")]
    if system.strip():
        pieces += _split_images(f"{system.lstrip()}\n\n", supervised=False, tags=tags)
    for turn in rounds:
        content = turn.text.strip()
        if turn.role == "user":
            pieces += _split_images(f"User: {content}\n\n", supervised=False, tags=turn.tags)
        else:
            pieces.append(Piece(kind="text", text="Assistant:"))
            if content:
                pieces += _split_images(f" {content}", supervised=turn.learned, tags=turn.tags)
                pieces.append(Piece(kind="eos", supervised=turn.learned))
    return pieces


def _require_alternation(rounds: Sequence[Turn], *, last: str) -> None:
    expected = ["user" if number % 2 == 0 else "assistant" for number in range(len(rounds))]
    roles = [turn.role for turn in rounds]
    if not rounds or roles != expected or roles[-1] != last:
        raise DataError(f"turns must alternate from user to {last}, found {', '.join(roles) or 'none'}")
