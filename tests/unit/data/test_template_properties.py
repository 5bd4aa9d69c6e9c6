"""Any conversation becomes the tokens of the released text, with the loss mask that its characters give.

The rule is stated here without `megavl.data.template`. The whole text is written out as in the release
(deepseek_vl/utils/conversation.py, processing_vlm.py) and tokenized as one string in which special tokens are
recognised. A token is supervised when its first character belongs to an answer, to the space before it or to the EOS
after it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer

from megavl.config.chat import SYSTEM_PROMPT
from megavl.convert.chat_template import chat_template
from megavl.convert.tokenizer_files import read_tokenizer, tokenizer_config, with_bos_first
from megavl.data.template import (
    IMAGE_TAG,
    Encoded,
    Piece,
    Turn,
    conversation_pieces,
    encode,
    inference_prompt,
)
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from tests.unit.data.corpus_files import SPECIALS, make_sentencepiece, make_tokenizer

BOS, EOS = SPECIALS[:2]
N = 3
NAMES = {"user": "User", "assistant": "Assistant"}
HUGGING_FACE = ("byte-level", "deepseek-like")

Tokens = list[tuple[int, int]]
"""Ids, each with the index of its first character."""


@dataclass(frozen=True)
class Case:
    """A tokenizer, and how a whole text with special tokens in it is tokenized."""

    ours: Tokenizer
    whole: Callable[[str], Tokens]
    folder: Path


def make_deepseek_like(folder: Path) -> Path:
    """The small tokenizer after DeepSeek's splits: lines, words, punctuation, CJK, single digits; offsets trimmed."""
    make_tokenizer(folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    patterns = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥]+")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    ends = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, *ends])
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder


def hugging_face(folder: Path) -> Case:
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def whole(text: str) -> Tokens:
        encoding = inner.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets)]

    return Case(open_tokenizer(folder), whole, folder)


def sentence_piece(path: Path) -> Case:
    inner = sentencepiece.SentencePieceProcessor(model_file=str(make_sentencepiece(path)))
    ids = {IMAGE_TAG: inner.piece_to_id(IMAGE_TAG), EOS: inner.eos_id()}

    def whole(text: str) -> Tokens:
        found, place = [], 0
        # Its control symbols are never recognised in text, so the text is cut at them.
        for part in re.split(f"({'|'.join(map(re.escape, ids))})", text):
            if part in ids:
                found.append((ids[part], place))
            else:
                for piece in inner.encode(part, return_type="proto").pieces:
                    found.append((piece.id, place + len(part.encode()[: piece.begin].decode())))
            place += len(part)
        return found

    return Case(open_tokenizer(path), whole, path.parent)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": hugging_face(make_tokenizer(root / "byte-level")),
        "deepseek-like": hugging_face(make_deepseek_like(root / "deepseek-like")),
        "sentencepiece": sentence_piece(root / "tokenizer.model"),
    }


WORDS = st.sampled_from(
    [
        *("red", " square", "User:", "Assistant:", ": ", "\n", "\n\n", " ", "\t", "  ", "12", "'s", "?!"),
        *("é", "e\u0301", "図形", "🙂", "ﬁ", "\u00a0", "\u2028", "\u3000", "\x1c"),
    ]
)
PLAIN = WORDS | st.text(st.characters(codec="utf-8", exclude_characters="<｜"), max_size=5)
TEXT = st.lists(PLAIN, max_size=5).map("".join)
CONTENT = st.lists(PLAIN | st.just(IMAGE_TAG), max_size=6).map("".join)
QUESTION = CONTENT.filter(str.strip)
# The system text: what a turn brings, what the caller gives, or the usual one.
SYSTEM = st.tuples(st.just("turn"), CONTENT) | st.tuples(st.just("argument"), TEXT) | st.just(("default", ""))
ROUNDS = st.lists(st.tuples(QUESTION, CONTENT | st.sampled_from(["", " \n"])), min_size=1, max_size=4)


def released_text(messages: Sequence[tuple[str, str]], system: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it answers stand, each with its space and its EOS."""
    text, answers = f"{system}\n\n" if system else "", []
    for position, (role, content) in enumerate(messages):
        text += f"{NAMES[role]}:"
        start = len(text)
        if content.strip():
            text += f" {content.strip()}" + ("\n\n" if position % 2 == 0 else EOS)
            if role == "assistant":
                answers.append((start, len(text)))
    cut = len(text) - len(text.lstrip())
    return text.strip(), [(start - cut, end - cut) for start, end in answers]


def expected(case: Case, messages: Sequence[tuple[str, str]], system: str) -> tuple[list[int], list[bool]]:
    """Ids with BOS in front and N positions for each image, and which of them are supervised."""
    text, answers = released_text(messages, system)
    ids, mask = [case.ours.bos_id], [False]
    for token, place in case.whole(text):
        if token == case.ours.image_id:
            ids += [token] * N
            mask += [False] * N
        else:
            ids.append(token)
            mask.append(any(start <= place < end for start, end in answers))
    return ids, mask


def turns_of(messages: Sequence[tuple[str, str]], system: tuple[str, str]) -> tuple[list[Turn], dict[str, str]]:
    """Our form of a conversation, and the arguments that it goes with."""
    kind, text = system
    first = [Turn(role="system", text=text)] if kind == "turn" else []
    turns = [*first, *(Turn(role=role, text=content) for role, content in messages)]
    return turns, {"system": text} if kind == "argument" else {}


def system_text(system: tuple[str, str]) -> str:
    return SYSTEM_PROMPT if system[0] == "default" else system[1]


def messages_of(rounds: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [message for asked, told in rounds for message in (("user", asked), ("assistant", told))]


def encoded(case: Case, pieces: list[Piece]) -> Encoded:
    return encode(pieces, tokenizer=case.ours, image_tokens=N)


def mask_of(sample: Encoded) -> list[bool]:
    return [any(start <= place < end for start, end in sample.spans) for place in range(len(sample.ids))]


def images_in(messages: Sequence[tuple[str, str]], system: tuple[str, str]) -> int:
    return sum(content.count(IMAGE_TAG) for _, content in [*messages, system])


@pytest.mark.parametrize("name", [*HUGGING_FACE, "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(rounds=ROUNDS, system=SYSTEM)
def test_training_samples_follow_the_released_text(
    cases: dict[str, Case], name: str, rounds: list[Any], system: tuple[str, str]
) -> None:
    case, messages = cases[name], messages_of(rounds)
    turns, arguments = turns_of(messages, system)
    sample = encoded(case, conversation_pieces(turns, template="deepseek", **arguments))
    ids, mask = expected(case, messages, system_text(system))
    assert sample.ids.tolist() == ids
    assert mask_of(sample) == mask
    assert sample.images == images_in(messages, system)
    assert all(a < b for a, b in sample.spans) and list(sample.spans) == sorted(sample.spans)
    # An answer that is there always has its EOS in the loss, one that is not has none.
    supervised = [token for token, counts in zip(ids, mask) if counts]
    assert supervised.count(case.ours.eos_id) == sum(bool(told.strip()) for _, told in rounds)


@pytest.mark.parametrize("name", [*HUGGING_FACE, "sentencepiece"])
@settings(max_examples=60, deadline=None)
@given(rounds=ROUNDS, asked=QUESTION, system=SYSTEM)
def test_inference_prompts_follow_the_released_text(
    cases: dict[str, Case], name: str, rounds: list[Any], asked: str, system: tuple[str, str]
) -> None:
    """It is the released text of the conversation with an empty answer at its end; nothing of it is supervised."""
    case, messages = cases[name], [*messages_of(rounds), ("user", asked)]
    turns, arguments = turns_of(messages, system)
    prompt = encoded(case, inference_prompt(turns, **arguments))
    ids, _ = expected(case, [*messages, ("assistant", "")], system_text(system))
    assert prompt.ids.tolist() == ids and prompt.spans == ()
    open_end = conversation_pieces([*turns, Turn(role="assistant", text="")], template="deepseek", **arguments)
    assert encoded(case, open_end).ids.tolist() == ids


@pytest.fixture(scope="module")
def exported(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers as an export writes them, opened by transformers."""
    opened = {}
    for name in HUGGING_FACE:
        folder = tmp_path_factory.mktemp(name)
        source = read_tokenizer(cases[name].folder)
        given = (cases[name].folder / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(with_bos_first(source) or given)
        (folder / "tokenizer_config.json").write_bytes(tokenizer_config(source, fmt="native", max_length=4096))
        template = chat_template(eos_token=source.tokens["eos_token"], image_token=IMAGE_TAG)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        opened[name] = AutoTokenizer.from_pretrained(folder)
    return opened


def in_parts(content: str) -> list[dict[str, str]]:
    """A content as the list of texts and images that a processor takes."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE_TAG)):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
    return parts


@pytest.mark.parametrize("name", HUGGING_FACE)
@settings(max_examples=60, deadline=None)
@given(rounds=ROUNDS, asked=st.none() | QUESTION, system=SYSTEM, parts=st.booleans())
def test_exported_chat_template_gives_equal_tokens(
    cases: dict[str, Case],
    exported: dict[str, Any],
    name: str,
    rounds: list[Any],
    asked: str | None,
    system: tuple[str, str],
    parts: bool,
) -> None:
    """As an inference prompt when a question is open, else as training text."""
    case, messages = cases[name], [*messages_of(rounds), *([("user", asked)] if asked is not None else [])]
    turns, arguments = turns_of(messages, system)
    pieces = (
        conversation_pieces(turns, template="deepseek", **arguments)
        if asked is None
        else inference_prompt(turns, **arguments)
    )
    spoken = [("system", system[1]), *messages] if system[0] != "default" else messages
    chat = [{"role": role, "content": in_parts(content) if parts else content} for role, content in spoken]
    text = exported[name].apply_chat_template(chat, tokenize=False, add_generation_prompt=asked is not None)
    assert text == released_text([*messages, *([("assistant", "")] if asked else [])], system_text(system))[0]
    ids: list[int] = []
    for token in exported[name](text)["input_ids"]:
        ids += [token] * (N if token == case.ours.image_id else 1)
    assert encoded(case, pieces).ids.tolist() == ids


@pytest.mark.parametrize("place", [0, 2])
def test_an_empty_question_is_refused(place: int) -> None:
    """The released text would run it into the answer: `User:Assistant: ...`."""
    turns = [Turn(role=role, text="a") for role in ("user", "assistant") * 2]
    turns[place] = Turn(role="user", text=" \n")
    for build in (lambda t: conversation_pieces(t, template="deepseek"), lambda t: inference_prompt(t[:3])):
        with pytest.raises(ValueError, match=rf"turn {place + 1} \(user\) is empty; give it text or an image"):
            build(turns)
