"""Long texts are divided only where their ids stay those of the whole text."""

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megavl.config.errors import DataError
from megavl.data import text_parts
from megavl.data.text_parts import safe_borders
from megavl.data.tokenizer import open_tokenizer

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DEEPSEEK = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = (
    rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{SUFFIX}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splits(*patterns: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


CUT = {
    "GPT-2": GPT2,
    "GPT-2 with a prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "DeepSeek": pre_tokenizers.Sequence([*_splits(*DEEPSEEK), pre_tokenizers.Digits(True), PLAIN]),
    "DeepSeek V3": pre_tokenizers.Sequence([*_splits(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", V3), PLAIN]),
    "Llama 3": pre_tokenizers.Sequence([*_splits(CL100K), PLAIN]),
    "GPT-4": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K), "removed", invert=True), PLAIN]),
    "GPT-4o": pre_tokenizers.Sequence([*_splits(O200K), PLAIN]),
    "StarCoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2]),
    "words": pre_tokenizers.Whitespace(),
    "BERT": pre_tokenizers.BertPreTokenizer(),
    "Metaspace": pre_tokenizers.Metaspace(),
    "Metaspace, first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "T5": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
}
WHOLE = {
    "none": None,
    "lines": pre_tokenizers.Split(Regex(r"[^\n]+\n?"), "isolated"),
    "letters with the space after them": pre_tokenizers.Split(Regex(r"\p{L}+ ?"), "isolated"),
    "merged": pre_tokenizers.Split(" ", "merged_with_previous"),
    "joined": pre_tokenizers.Metaspace(split=False),
    "bytes first": pre_tokenizers.Sequence([PLAIN, *_splits(r"\p{L}+")]),
}
ATOMS = [
    "a",
    "Be",
    "don't",
    "It'S",
    "中文",
    "文",
    "한국",
    "приём",
    "é",
    "e\u0301",
    "7",
    "1234567",
    "=",
    "--",
    ".",
    "。",
    "🙂",
]
BLANKS = [" ", " ", "  ", "\n", "\n", "\n\n", "\r\n", "\t", " \n ", "\u3000", ""]


def _text(seed: int, *, atoms: int = 150) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(ATOMS) + draw.choice(BLANKS) for _ in range(atoms))


def _save(folder: Path, pre_tokenizer: Any, *, normalizer: Any = None, added: list[AddedToken] | None = None) -> Path:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.normalizer = pre_tokenizer, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([_text(seed) for seed in range(4)], trainer)
    inner.add_tokens(added or [])
    inner.save(str(folder / "tokenizer.json"))
    return folder


def _borders(folder: Path) -> re.Pattern[str] | None:
    return safe_borders(json.loads((folder / "tokenizer.json").read_bytes()))


@pytest.mark.parametrize("name", CUT)
def test_ids_in_parts_are_those_of_the_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, CUT[name]))
    for seed in range(12):
        text = _text(seed)
        monkeypatch.setattr(text_parts, "_PART", 1 << 30)
        whole = tokenizer.encode(text)
        sides = [text[:300], text[300:]]
        _, owners = tokenizer.encode_parts(sides)
        monkeypatch.setattr(text_parts, "_PART", seed + 1)
        assert len(list(text_parts.parts(text, borders=tokenizer._borders))) > 3
        assert [token for ids in tokenizer.encode_long(text) for token in ids] == whole
        ids, in_parts = tokenizer.encode_parts(sides)
        assert ids == whole
        assert in_parts == owners


@pytest.mark.parametrize("normalizer", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase"])
@pytest.mark.parametrize("name", ["DeepSeek", "Llama 3", "BERT"])
def test_normalizers_do_not_move_borders(
    name: str, normalizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, CUT[name], normalizer=getattr(normalizers, normalizer)()))
    for seed in range(6):
        monkeypatch.setattr(text_parts, "_PART", 1 << 30)
        whole = tokenizer.encode(_text(seed))
        monkeypatch.setattr(text_parts, "_PART", 1)
        assert len(list(text_parts.parts(_text(seed), borders=tokenizer._borders))) > 3
        assert [token for ids in tokenizer.encode_long(_text(seed)) for token in ids] == whole


@pytest.mark.parametrize("name", WHOLE)
def test_unproven_pre_tokenizers_take_the_text_whole(name: str, tmp_path: Path) -> None:
    assert _borders(_save(tmp_path, WHOLE[name])) is None


@pytest.mark.parametrize(
    "added",
    [
        AddedToken("a b", special=False),
        AddedToken("ab", special=False, rstrip=True),
        AddedToken("ab", special=False, single_word=True),
    ],
)
def test_added_tokens_across_blanks_take_the_text_whole(added: AddedToken, tmp_path: Path) -> None:
    assert _borders(_save(tmp_path, GPT2, added=[added])) is None


@pytest.mark.parametrize("normalizer", [normalizers.Prepend("▁"), normalizers.BertNormalizer(), normalizers.Strip()])
def test_unproven_normalizers_take_the_text_whole(normalizer: Any, tmp_path: Path) -> None:
    assert _borders(_save(tmp_path, GPT2, normalizer=normalizer)) is None


@pytest.mark.parametrize("name", ["GPT-2", "DeepSeek", "DeepSeek V3", "Llama 3", "GPT-4o"])
def test_long_words_are_divided_between_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, CUT[name]))
    monkeypatch.setattr(text_parts, "_PART", 50)
    monkeypatch.setattr(text_parts, "LONG", 200)
    monkeypatch.setattr("megavl.data.tokenizer.LONG", 200)
    draw = random.Random(3)
    kinds = ["a", "ab", "no", "中文", "文", " ", "no one is"]
    kinds += ["".join(draw.choices("abnoise", k=977)), "".join(draw.choices("中文国한", k=977))]
    kinds += ["".join(draw.choices("ABnoiseQ+/7", k=977)), "noone" + "is" * 400]
    divided = 0
    for kind in kinds:
        for size in (977, 1203):
            word = f"x{kind * size}"[:size]
            (whole,) = tokenizer._encode([word])
            ids = tokenizer._encode_word(word)
            divided += ids is not None
            assert ids is None or ids.tolist() == whole
            assert tokenizer.encode(word) == whole
    assert divided > len(kinds)


def _model(folder: Path, **options: Any) -> Path:
    """A SentencePiece model of the atoms."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(_text(seed).replace("\n", " ") for seed in range(40)),
        model_writer=out,
        **{"model_type": "bpe", "vocab_size": 480, "hard_vocab_limit": False, "minloglevel": 2} | options,
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True},
        {"normalization_rule_name": "nfkc_cf"},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"user_defined_symbols": ["a", "It"]},
        {"split_by_whitespace": False, "max_sentencepiece_length": 4},
    ],
    ids=["nmt_nfkc", "Llama", "lower case", "Gemma", "user-defined", "pieces across words"],
)
def test_ids_of_a_sentencepiece_model_in_parts(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = open_tokenizer(_model(tmp_path, **options))
    words = ["a", "Be", "It'S", "x", "é", "e\u0301", "Q7", "z", "noise"]
    divided = 0
    for seed in range(8):
        draw = random.Random(seed)
        text = _text(seed) + " ".join(draw.choices(words, k=200)) + _text(seed + 50)
        monkeypatch.setattr(text_parts, "_PART", 1 << 30)
        (whole,) = tokenizer._encode([text])
        at = draw.randrange(len(text))
        sides = [text[:at], text[at:]]
        _, owners = tokenizer.encode_parts(sides)
        monkeypatch.setattr(text_parts, "_PART", seed + 1)
        divided += len(list(text_parts.parts(text, borders=tokenizer._borders)))
        assert [token for ids in tokenizer.encode_long(text) for token in ids] == whole
        assert tokenizer.encode_parts(sides) == (whole, owners)
    assert divided > 100


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["a b"]},
    ],
)
def test_unproven_models_take_the_text_whole(options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = open_tokenizer(_model(tmp_path, **options))
    assert tokenizer._borders is None
    with pytest.raises(DataError, match="one piece, above 8,388,608"):
        tokenizer.encode("a b" * 3_000_000)


def test_rules_across_spaces_take_the_text_whole(tmp_path: Path) -> None:
    for number, rule in enumerate(["61 20\t62", "20\t5F", "E9 20 61\t62", "20 61\t62"]):
        rules = tmp_path / f"{number}.tsv"
        rules.write_text(f"{rule}\n")
        (tmp_path / str(number)).mkdir()
        tokenizer = open_tokenizer(_model(tmp_path / str(number), normalization_rule_tsv=str(rules)))
        assert tokenizer._borders is None, rule
    rules.write_text("51\t71\n")
    borders = open_tokenizer(_model(tmp_path, normalization_rule_tsv=str(rules)))._borders
    assert borders is not None and "Q" not in borders.pattern and "P" in borders.pattern


def test_a_text_too_long_for_one_piece_is_refused(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(_save(tmp_path, None))
    text = "a b" * 700_000
    with pytest.raises(DataError, match="one piece, above 2,097,152"):
        tokenizer.encode(text)
    with pytest.raises(DataError, match="one piece"):
        tokenizer.encode_parts([text, " b"])
