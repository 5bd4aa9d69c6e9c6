"""From conversations and documents to token ids with supervised spans.

The "deepseek" template follows the released code (deepseek_vl/utils/conversation.py), not the chat template of the
Hugging Face port, which drops the last EOS. Text between two special tokens is tokenized in one go, so training ids
equal those of the whole prompt; a token is supervised when its first character is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError
from megavl.data.tokenizer import IMAGE_TOKEN, Tokenizer

IMAGE_TAG = IMAGE_TOKEN
"""Stands for one image in the text of a turn or a tagged document."""

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""deepseek_vl/models/processing_vlm.py:78."""

Template = Literal["deepseek", "plain", "none"]
_ROLE_NAMES = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    """With one IMAGE_TAG per image."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a prompt."""

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
    body = _split_images(text, supervised=True) if tagged else [Piece(kind="text", text=text, supervised=True)]
    if template == "none":
        return body
    return [Piece(kind="bos"), *body, Piece(kind="eos", supervised=True)]


def conversation_pieces(turns: Sequence[Turn], *, template: Template, system: str = SYSTEM_PROMPT) -> list[Piece]:
    """A conversation for training.

    `deepseek`: BOS, system text and a blank line, then `User: ...`, blank line, `Assistant: ...`, EOS; supervised are
    each answer with its leading space, and its EOS. `plain` and `none`: the messages joined, as in `document_pieces`.

    Args:
        turns: an optional system turn, then user and assistant in alternation.
        template: row of the table above.
        system: system text where the conversation brings none; empty for none at all.

    Raises:
        DataError: the turns do not alternate, or one is empty.
    """
    if template != "deepseek":
        return document_pieces("".join(turn.text for turn in turns), template=template, tagged=True)
    system, rounds = _checked(turns, system=system, last="assistant")
    pieces = [Piece(kind="bos"), *_system_pieces(system)]
    for turn in rounds:
        content = turn.text.strip()
        if turn.role == "user":
            pieces += _split_images(f"User: {content}\n\n", supervised=False)
        else:
            pieces.append(Piece(kind="text", text="Assistant:"))
            pieces += _split_images(f" {content}", supervised=True)
            pieces.append(Piece(kind="eos", supervised=True))
    return pieces


def inference_prompt(turns: Sequence[Turn], *, system: str = SYSTEM_PROMPT) -> list[Piece]:
    """A conversation whose next message is the assistant's; ends with `Assistant:`, so answers begin with a space.

    Args:
        turns: as in `conversation_pieces`, the last one of the user.
        system: system text where the conversation brings none.

    Raises:
        DataError: the turns do not alternate, or one is empty.
    """
    system, rounds = _checked(turns, system=system, last="user")
    pieces = [Piece(kind="bos"), *_system_pieces(system)]
    for turn in rounds:
        content = turn.text.strip()
        separator = [Piece(kind="text", text="\n\n")] if turn.role == "user" else [Piece(kind="eos")]
        pieces += [*_split_images(f"{_ROLE_NAMES[turn.role]}: {content}", supervised=False), *separator]
    return [*pieces, Piece(kind="text", text="Assistant:")]


def prompt_ids(text: str, *, tokenizer: Tokenizer, image_tokens: int, bos: bool = True) -> list[int]:
    """Ids of free text in which IMAGE_TAG stands for an image; with BOS in front unless `bos` is off."""
    start = [Piece(kind="bos")] if bos else []
    pieces = [*start, *_split_images(text, supervised=False)]
    return [int(token) for token in encode(pieces, tokenizer=tokenizer, image_tokens=image_tokens).ids]


def encode(pieces: Sequence[Piece], *, tokenizer: Tokenizer, image_tokens: int) -> Encoded:
    """Token ids and supervised spans of one sample.

    Args:
        pieces: from one of the functions above.
        tokenizer: places special tokens by id.
        image_tokens: positions of one image.

    Raises:
        DataError: images without an image token in the vocabulary, or text that yields the image token.
    """
    return encode_batch([pieces], tokenizer=tokenizer, image_tokens=image_tokens)[0]


def encode_batch(samples: Sequence[Sequence[Piece]], *, tokenizer: Tokenizer, image_tokens: int) -> list[Encoded]:
    """`encode` for many samples; those of one text piece at a time go through the tokenizer's batch call together."""
    runs = [list(_runs(pieces)) for pieces in samples]
    uniform = [run for sample in runs for run in sample if run[0].kind == "text" and _is_uniform(run)]
    texts = ["".join(piece.text for piece in run) for run in uniform]
    ready = {id(run): ids for run, ids in zip(uniform, tokenizer.encode_batch(texts))}
    return [_assemble(sample, ready, tokenizer=tokenizer, image_tokens=image_tokens) for sample in runs]


def _assemble(
    runs: Iterable[list[Piece]], ready: dict[int, list[int]], *, tokenizer: Tokenizer, image_tokens: int
) -> Encoded:
    ids: list[int] = []
    flags: list[bool] = []
    images = 0
    for run in runs:
        kind = run[0].kind
        if kind == "text":
            if id(run) in ready:
                new, marks = ready[id(run)], [run[0].supervised] * len(ready[id(run)])
            else:
                new, parts = tokenizer.encode_parts([piece.text for piece in run])
                marks = [run[part].supervised for part in parts]
            if tokenizer.image_id is not None and tokenizer.image_id in new:
                raise DataError(f"the text itself yields the image token id {tokenizer.image_id}")
        elif kind == "image":
            if tokenizer.image_id is None:
                raise DataError(f"{tokenizer.path}: no {IMAGE_TOKEN} token; add it to the vocabulary to use images")
            new, marks = [tokenizer.image_id] * image_tokens, [False] * image_tokens
            images += 1
        else:
            token = tokenizer.bos_id if kind == "bos" else tokenizer.eos_id
            new = [] if token is None else [token]
            marks = [run[0].supervised] * len(new)
        ids += new
        flags += marks
    return Encoded(ids=np.array(ids, np.int32), spans=_spans(flags), images=images)


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


def _is_uniform(run: list[Piece]) -> bool:
    return all(piece.supervised == run[0].supervised for piece in run)


def _spans(flags: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.array(flags, bool), [False]]).astype(np.int8)))
    return tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2))


def _split_images(text: str, *, supervised: bool) -> list[Piece]:
    pieces: list[Piece] = []
    for number, part in enumerate(text.split(IMAGE_TAG)):
        if number:
            pieces.append(Piece(kind="image"))
        if part:
            pieces.append(Piece(kind="text", text=part, supervised=supervised))
    return pieces


def _system_pieces(system: str) -> list[Piece]:
    return [Piece(kind="text", text=f"{system}\n\n")] if system else []


def _checked(turns: Sequence[Turn], *, system: str, last: str) -> tuple[str, Sequence[Turn]]:
    """System text and the alternating turns after it."""
    rounds = list(turns)
    if rounds and rounds[0].role == "system":
        system = rounds.pop(0).text
    expected = ["user" if number % 2 == 0 else "assistant" for number in range(len(rounds))]
    roles = [turn.role for turn in rounds]
    if not rounds or roles != expected or roles[-1] != last:
        raise DataError(f"turns must alternate from user to {last}, found {', '.join(roles) or 'none'}")
    for number, turn in enumerate(rounds):
        if not turn.text.strip():
            raise DataError(f"turn {number + 1} ({turn.role}) is empty")
    return system.strip(), rounds
