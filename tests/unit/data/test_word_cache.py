"""Words that are remembered have the ids that they have in the whole text."""

import random
from array import array
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

from megavl.config.errors import DataError
from megavl.data import word_cache
from megavl.data.template import Piece, Turn, conversation_pieces, encode_batch
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.data.word_cache import WordCache
from tests.unit.data.test_text_parts import ATOMS, BLANKS, CUT, DEEPSEEK, GPT2, PLAIN, WHOLE, _save, _splits

MARKS = ["\u0301", "\u0338", "'s", "'LL", "x_y", "foo.bar", "<tool>", "ab.cd", *"!#%&(),-/:;<>@[]`{|}~"]
SPLITS = {
    "letters alone": pre_tokenizers.Sequence([*_splits(r"\p{L}+"), PLAIN]),
    "letters, then blanks": pre_tokenizers.Sequence([*_splits(r"\p{L}+", r" ?\p{L}+|\s+"), PLAIN]),
    "characters before words": pre_tokenizers.Sequence([*_splits(*reversed(DEEPSEEK[1:])), PLAIN]),
    "blanks before words": pre_tokenizers.Sequence([*_splits(r"\s+", r"\s?\p{L}+"), PLAIN]),
    "punctuation, then its word": pre_tokenizers.Sequence([pre_tokenizers.Punctuation("merged_with_next"), GPT2]),
    "words, then GPT-2": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), GPT2]),
}
CHANGES: list[tuple[Any, list[AddedToken]]] = [
    (None, [AddedToken("<tool>", special=False, normalized=False)]),
    (normalizers.NFKD(), []),
    (normalizers.Lowercase(), [AddedToken("ab.cd", special=False), AddedToken(".,", special=False)]),
]


def _texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    atoms = [*ATOMS, *MARKS]
    blanks = [*BLANKS, "", "", "\x1c", "\x85"]
    return ["".join(draw.choice(atoms) + draw.choice(blanks) for _ in range(draw.choice((4, 60)))) for _ in range(30)]


def _remembered(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer.encode_similar(texts)]


@pytest.mark.parametrize("name", [*CUT, *SPLITS])
def test_remembered_words_have_the_same_ids(name: str, tmp_path: Path) -> None:
    for number, (form, added) in enumerate(CHANGES):
        tokenizer = open_tokenizer(_save(tmp_path, (CUT | SPLITS)[name], normalizer=form, added=added))
        assert tokenizer._words is not None
        texts = _texts(number)
        assert _remembered(tokenizer, texts) == tokenizer.encode_batch(texts)
        assert _remembered(tokenizer, texts[::-1]) == tokenizer.encode_batch(texts[::-1])


@pytest.mark.parametrize("name", WHOLE)
def test_unproven_pre_tokenizers_remember_nothing(name: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, WHOLE[name]))
    assert tokenizer._words is None
    assert _remembered(tokenizer, ["a word", ""]) == tokenizer.encode_batch(["a word", ""])


@pytest.mark.parametrize("name", [*CUT, *SPLITS, *WHOLE])
def test_answers_apart_have_the_same_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, (CUT | SPLITS | WHOLE)[name]))
    turns = [Turn(role="user", text="Is it?"), Turn(role="assistant", text="Yes, it is.")]
    talks = [_talk(text, text) for text in _texts(5)] + [conversation_pieces(turns, template="deepseek")]
    talks += [_talk(f"{side} Assistant:", f" {text}") for side, text in zip(_texts(6), _texts(7))]
    apart = encode_batch(talks, tokenizer=tokenizer, image_tokens=1)
    monkeypatch.setattr(tokenizer, "divides_at", lambda text, position: False)
    for one, other in zip(apart, encode_batch(talks, tokenizer=tokenizer, image_tokens=1)):
        assert one.ids.tolist() == other.ids.tolist() and one.spans == other.spans


def test_usual_answers_come_from_remembered_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, CUT["DeepSeek"]))
    turns = [Turn(role="user", text="Is it 红?"), Turn(role="assistant", text="It is.")] * 2
    monkeypatch.delattr(type(tokenizer), "_encode_with_starts")
    (encoded,) = encode_batch([conversation_pieces(turns, template="deepseek")], tokenizer=tokenizer, image_tokens=1)
    assert len(encoded.spans) == 2


def _talk(asked: str, answered: str) -> list[Piece]:
    return [Piece(kind="text", text=asked), Piece(kind="text", text=answered, supervised=True)]


def test_each_word_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def encode(words: list[str]) -> list[list[int]]:
        asked.extend(words)
        return [[len(word)] for word in words]

    monkeypatch.setattr(word_cache, "_KEPT", 3)
    cache = WordCache(r"(?<=[a-z])(?= )", encode=encode)
    assert cache.encode_batch(["a bc a", " bc"]) == [array("i", [1, 3, 2]), array("i", [3])]
    assert cache.encode_batch(["a bc"]) == [array("i", [1, 3])]
    assert asked == ["a", " bc", " a"]
    cache.encode_batch([f"d{' e' * 2} {'x' * 65}"])
    assert [word for word in ("a", "d", " e", f" {'x' * 65}") if word in cache._known] == ["d", " e"]


def test_a_control_token_is_reported_for_its_text(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, CUT["DeepSeek"]))
    tokenizer.control_ids |= {tokenizer.encode("a = b")[1]}
    with pytest.raises(DataError, match="the text itself yields the control token"):
        tokenizer.encode_similar(["fine", "a = b"])
