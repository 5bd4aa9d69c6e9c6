"""Streamed text equals the text of the whole answer and never splits a character."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch

from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.generate.prompt import answer_text
from megavl.generate.stream import TextStream

TEXT = " größer: 図形は赤い 🙂👩‍👩‍👧 e\u0301 — done.\n\n  two  spaces "


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece vocabulary that spells unknown characters in bytes."""
    prefix = tmp_path_factory.mktemp("pieces") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["which colour is it? red green blue", "dark red and dark green"] * 20),
        model_prefix=str(prefix),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=0,
        eos_id=1,
        unk_id=2,
        minloglevel=2,
    )
    return open_tokenizer(Path(f"{prefix}.model"))


def parts(ids: list[int], *, tokenizer: Tokenizer, strip: bool = False) -> list[str]:
    stream = TextStream(tokenizer, strip=strip)
    found = [stream.add(token) for token in ids] + [stream.end()]
    assert "".join(found) == stream.shown
    return found


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_characters_arrive_whole(kind, tokenizer, pieces):
    chosen = tokenizer if kind == "bytes" else pieces
    ids = chosen.encode(TEXT)
    whole = answer_text(ids, tokenizer=chosen)
    found = parts([*ids, chosen.eos_id], tokenizer=chosen)
    # SentencePiece normalises what it reads; the byte-level vocabulary gives everything back.
    assert "".join(found) == whole and (whole == TEXT or kind == "pieces") and "図形は赤い 🙂" in whole
    assert not any("\ufffd" in part for part in found)
    assert sum(part == "🙂" for part in found) == 1
    stripped = parts([*ids, chosen.eos_id], tokenizer=chosen, strip=True)
    assert "".join(stripped) == whole.strip() and not any("\ufffd" in part for part in stripped)


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_random_tokens_stream_to_their_text(kind, strip, tokenizer, pieces):
    """Random tokens are mostly incomplete characters; their pieces still join to the whole text."""
    chosen = tokenizer if kind == "bytes" else pieces
    for seed in range(30):
        ids = torch.randint(0, chosen.vocab_size, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        whole = answer_text(ids, tokenizer=chosen)
        assert "".join(parts(ids, tokenizer=chosen, strip=strip)) == (whole.strip() if strip else whole)


def test_complete_text_is_shown_at_once(tokenizer):
    ids = tokenizer.encode("red green blue")
    found = parts(ids, tokenizer=tokenizer)
    assert found == [tokenizer.decode([token]) for token in ids] + [""]


def test_incomplete_last_character_is_shown(tokenizer):
    ids = tokenizer.encode("a🙂")[:-1]
    found = parts(ids, tokenizer=tokenizer)
    assert found[0] == "a" and set(found[1:-1]) == {""} and found[-1] == answer_text(ids, tokenizer=tokenizer)[1:]
