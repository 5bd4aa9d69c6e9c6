"""Pieces of single tokens add up to the text, in byte-level and SentencePiece vocabularies."""

from __future__ import annotations

from pathlib import Path

from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.serve.token_texts import TokenTexts
from tests.unit.data.corpus_files import make_sentencepiece

TEXTS = ("red green  blue", " a red thing", "你好 🙂 red", "é\n\n\tx")


def check(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
        texts = TokenTexts(tokenizer)
        pieces = []
        for token in ids:
            label = texts.label(token)
            pieces.append(texts.add(token))
            assert label == (pieces[-1] or f"token_id:{token}")
        assert "".join(pieces) == tokenizer.decode(ids) and pieces[0] == pieces[-1] == ""
        assert any("\ufffd" in tokenizer.decode([token]) for token in ids) == (not all(pieces[1:-1]))


def test_byte_level_pieces(tokenizer: Tokenizer) -> None:
    check(tokenizer)


def test_sentencepiece_pieces(tmp_path: Path) -> None:
    opened = open_tokenizer(make_sentencepiece(tmp_path / "tokenizer.model"))
    for text in TEXTS[:2]:
        ids, texts = opened.encode(text), TokenTexts(opened)
        assert "".join(texts.add(token) for token in ids) == opened.decode(ids)


def test_labels_tell_tokens_apart(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    tokens = [*range(tokenizer.vocab_size), tokenizer.vocab_size + 7]
    labels = texts.labels(tokens)
    assert len(set(labels.values())) == len(tokens)
    assert labels[tokenizer.eos_id] == f"token_id:{tokenizer.eos_id}"
    assert labels[tokenizer.vocab_size + 7] == f"token_id:{tokenizer.vocab_size + 7}"
