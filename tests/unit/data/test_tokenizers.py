"""Both kinds of tokenizer: ids, special tokens by id only, and identity."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megavl.config.errors import DataError
from megavl.data.tokenizer import open_tokenizer
from tests.unit.data.corpus_files import SENTENCES, SPECIALS, make_sentencepiece, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_hugging_face_ids_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = open_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in [*SENTENCES, "schön 図 🙂", "  two  spaces "]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
    assert [ours.bos_id, ours.eos_id, ours.pad_id, ours.image_id] == [0, 1, 2, 3]
    assert ours.vocab_size == len(theirs)


def test_special_tokens_spelled_in_text_stay_text(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    assert not set(tokenizer.encode(" ".join(SPECIALS))) & {0, 1, 2, 3}


def test_file_and_folder_are_the_same_tokenizer(folder: Path) -> None:
    whole, alone = open_tokenizer(folder), open_tokenizer(folder / "tokenizer.json")
    assert whole.entry == alone.entry
    assert [file.name for file in whole.files] == ["tokenizer.json", "tokenizer_config.json"]


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(make_sentencepiece(tmp_path / "tokenizer.model"))
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0].replace("\n", " "))) == SENTENCES[0].replace("\n\n", " ")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.image_id is not None
    assert open_tokenizer(tmp_path).sha256 == tokenizer.sha256
    without = open_tokenizer(make_sentencepiece(tmp_path / "text.model", image_token=False))
    assert without.image_id is None


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_tokens_belong_to_the_part_they_begin(kind: str, folder: Path, tmp_path: Path) -> None:
    path = folder if kind == "bpe" else make_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = open_tokenizer(path)
    parts = ["User: é?", " Assistant:", " red square"]
    ids, marks = tokenizer.encode_parts(parts)
    assert ids == tokenizer.encode("".join(parts))
    assert marks == sorted(marks)
    last = [token for token, mark in zip(ids, marks) if mark == 2]
    assert tokenizer.decode(last).strip() == "red square"


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_a_file_without_a_tokenizer_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="tokenizer"):
        open_tokenizer(path)
    with pytest.raises(DataError, match=str(tmp_path)):
        open_tokenizer(tmp_path)
