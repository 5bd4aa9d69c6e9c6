"""Control tokens that a text spells stay text, however the tokenizer declares them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megavl.config.errors import DataError
from megavl.data.template import IMAGE_TAG, Piece, document_pieces, encode
from megavl.data.tokenizer import open_tokenizer
from tests.unit.data.corpus_files import SENTENCES

BOS, EOS, PAD, IMAGE, OWN = "<｜begin▁of▁sentence｜>", "</s>", "<pad>", "<image_placeholder>", "<own>"
CONTROLS = (BOS, EOS, PAD, IMAGE, OWN)
IDS = dict(zip(CONTROLS, range(1, 6)))
TEXT = f"a{EOS} {EOS}b {IMAGE} {BOS}{PAD} {OWN}."
LETTERS = sorted({*"".join(CONTROLS), *"ab .Hi!"})
ROLES = {"bos_token": BOS, "eos_token": {"content": EOS}, "pad_token": PAD, "image_token": IMAGE}


def _bpe(*, ignore_merges: bool = False, merged: bool = False) -> Any:
    """Characters and control tokens; with `merged`, merges build every control token from the left."""
    vocabulary = {"<unk>": 0, **IDS}
    vocabulary |= {letter: len(vocabulary) + number for number, letter in enumerate(LETTERS)}
    merges: list[tuple[str, str]] = []
    for name in CONTROLS if merged else ():
        for end in range(1, len(name)):
            vocabulary.setdefault(name[: end + 1], len(vocabulary))
            merges.append((name[:end], name[end]))
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", ignore_merges=ignore_merges)


def _word_piece() -> Any:
    vocabulary = {"<unk>": 0, **IDS}
    for letter in LETTERS:
        vocabulary |= {letter: len(vocabulary), f"##{letter}": len(vocabulary) + 1}
    return models.WordPiece(vocab=vocabulary, unk_token="<unk>")


def _unigram() -> Any:
    pieces = [("<unk>", 0.0), *((name, 0.0) for name in CONTROLS), *((letter, -9.0) for letter in LETTERS)]
    return models.Unigram(pieces, unk_id=0, byte_fallback=False)


MODELS = {
    "BPE": _bpe,
    "merging BPE": lambda: _bpe(merged=True),
    "BPE that ignores merges": lambda: _bpe(ignore_merges=True),
    "WordPiece": _word_piece,
    "Unigram": _unigram,
}


def _save(folder: Path, model: Any, *, added: Sequence[AddedToken] = (), **files: Any) -> Path:
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    inner.add_tokens(list(added))
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


DECLARATIONS: dict[str, dict[str, Any]] = {
    "special": {"added": [AddedToken(name, special=True) for name in CONTROLS]},
    "not special": {"added": [AddedToken(name, special=False) for name in CONTROLS[:4]], "names": [OWN]},
    "not special, normalized": {"added": [AddedToken(name, normalized=True) for name in CONTROLS[:4]], "names": [OWN]},
    "names in the vocabulary": {"names": [OWN]},
    "map": {"special_tokens_map": {**ROLES, "additional_special_tokens": [{"content": OWN}]}},
    "map with strings": {"special_tokens_map": {**ROLES, "additional_special_tokens": [OWN]}},
    "config": {"tokenizer_config": {**ROLES, "additional_special_tokens": [OWN], "add_bos_token": True}},
    "extra": {"tokenizer_config": {**ROLES, "extra_special_tokens": {"own_token": OWN}}},
    "decoder": {
        "tokenizer_config": {
            "eos_token": EOS,
            "added_tokens_decoder": {str(IDS[name]): {"content": name, "special": True} for name in CONTROLS},
        }
    },
}


@pytest.mark.parametrize("declaration", DECLARATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_spelled_control_tokens_stay_text(model: str, declaration: str, tmp_path: Path) -> None:
    files = dict(DECLARATIONS[declaration])
    names = files.pop("names", [])
    if names:
        files["tokenizer_config"] = {"additional_special_tokens": names}
    tokenizer = open_tokenizer(_save(tmp_path, MODELS[model](), **files))
    specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id)
    assert specials == (IDS[BOS], IDS[EOS], IDS[PAD], IDS[IMAGE])
    ids = tokenizer.encode(TEXT)
    assert not set(ids) & set(IDS.values())
    assert tokenizer.decode(ids).replace("##", "") == TEXT.replace(" ", "")
    parts, _ = tokenizer.encode_parts([TEXT[:5], TEXT[5:]])
    assert parts == ids
    assert tokenizer.decode([*IDS.values(), *ids]) == tokenizer.decode(ids)


def test_ordinary_added_tokens_are_found_in_text(tmp_path: Path) -> None:
    added = [AddedToken("ab", special=False), AddedToken(EOS, special=True)]
    tokenizer = open_tokenizer(_save(tmp_path, _bpe(), added=added))
    (token,) = tokenizer.encode("ab")
    assert token not in tokenizer.control_ids


def test_a_control_token_of_one_character_stays_a_character(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, _bpe(), tokenizer_config={"pad_token": "!"}))
    assert tokenizer.decode(tokenizer.encode("Hi!")) == "Hi!"
    assert tokenizer.pad_id == tokenizer.encode("!")[0]


def test_unknown_characters_that_give_the_end_token_are_refused(tmp_path: Path) -> None:
    model = models.WordLevel(vocab={"</s>": 0, "a": 1}, unk_token="</s>")
    tokenizer = open_tokenizer(_save(tmp_path, model))
    with pytest.raises(DataError, match="control token id 0"):
        encode(document_pieces("a b", template="plain", tagged=False), tokenizer=tokenizer, image_tokens=3)


def _sentencepiece(path: Path, **settings: Any) -> Path:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES * 20, *[f"{EOS} {PAD} {IMAGE} {OWN}"] * 200]),
        model_writer=out,
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(out.getvalue())
    return path


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word", "char"])
@pytest.mark.parametrize(
    "settings",
    [
        {"control_symbols": [PAD, IMAGE, OWN]},
        {"user_defined_symbols": [PAD, IMAGE, OWN]},
        {"user_defined_symbols": [EOS, PAD, IMAGE, OWN], "eos_id": -1},
        {"user_defined_symbols": [EOS, IMAGE], "eos_id": -1, "bos_id": -1, "pad_id": 1},
        {"eos_id": 5, "pad_id": 6, "eos_piece": "<over>", "user_defined_symbols": [EOS, IMAGE]},
        {"eos_piece": "<over>", "user_defined_symbols": ["<over>", IMAGE]},
    ],
)
def test_spelled_sentencepiece_symbols_stay_text(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = _sentencepiece(tmp_path / "tokenizer.model", model_type=model_type, **settings)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": [OWN]}))
    tokenizer = open_tokenizer(path)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = [name for name in (EOS, PAD, IMAGE, OWN, "<over>") if plain.piece_to_id(name) != plain.unk_id()]
    controls = {plain.piece_to_id(name) for name in names}
    text = " ".join(names)
    ids = tokenizer.encode(text)
    assert not set(ids) & controls
    assert tokenizer.image_id == plain.piece_to_id(IMAGE)
    assert tokenizer.eos_id == plain.piece_to_id(settings.get("eos_piece", EOS))
    assert tokenizer.pad_id in controls
    assert tokenizer.encode(SENTENCES[0]) == plain.encode(SENTENCES[0])
    assert tokenizer.decode([*controls, *tokenizer.encode("What")]) == tokenizer.decode(tokenizer.encode("What"))


def test_an_image_comes_only_from_its_piece(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, _bpe(merged=True)))
    pieces = [
        Piece(kind="text", text=f"a {IMAGE_TAG} <image> "),
        Piece(kind="image"),
        Piece(kind="text", text=IMAGE_TAG),
    ]
    encoded = encode(pieces, tokenizer=tokenizer, image_tokens=3)
    assert encoded.images == 1
    assert encoded.ids.tolist().count(IDS[IMAGE]) == 3


def test_normalized_spellings_stay_text(tmp_path: Path) -> None:
    inner = Tokenizer(_bpe(merged=True))
    inner.normalizer = normalizers.NFKC()
    inner.save(str(tmp_path / "tokenizer.json"))
    # The normalizer makes the control token of full-width brackets.
    assert IDS[EOS] not in open_tokenizer(tmp_path).encode("＜/s＞")
