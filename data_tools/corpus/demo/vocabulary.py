"""Trains a small byte-level BPE tokenizer like DeepSeek's, for the tiny models.

Hugging Face transformers loads its files as LlamaTokenizerFast, like those of the released models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_tools.corpus.output import write_json
from data_tools.readers.files import container_of, divide_file, entries
from data_tools.readers.formats import read_record
from data_tools.readers.record import Entry, RecordError, parse_json
from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.foreign.reading import open_regular

PAD, BOS, EOS, IMAGE = "<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
SPECIAL = (PAD, BOS, EOS, IMAGE)
"""Special tokens in the order of their ids, from 0; the tiny presets expect the image token at 3."""

MIN_VOCABULARY = 256 + len(SPECIAL)
"""Size without any merge: all bytes and the special tokens."""
_START = 512
"""Bytes that tell the kind of a file."""
_SPLIT_BYTES = 64 << 20

REPEATS = 1000
"""Weight of a phrase, high enough that each of its words becomes one token with any other text."""

TEMPLATE = ("User:", "Assistant:", SYSTEM_PROMPT)
"""Texts that the chat template adds to every conversation."""

_SPLITS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
"""Patterns of pre-tokenization, like those of the released tokenizer."""


def train_tokenizer(texts: Iterable[str], *, phrases: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE.

    Args:
        texts: training texts.
        phrases: short texts whose words should each become one token, like those of the chat template.
        vocab_size: entries, bytes and special tokens included; a very small corpus gives fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    weighted = [phrase for phrase in sorted({*phrases, *TEMPLATE}) for _ in range(REPEATS)]
    tokenizer.train_from_iterator(chain(texts, weighted), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS}:0 $A:0", pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_tokens: int = 4096) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    Args:
        tokenizer: a trained tokenizer.
        folder: output folder; created if absent.
        max_tokens: value of `model_max_length` in the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL)
        },
        **special,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": IMAGE},
        "image_token": IMAGE,
        "legacy": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_tokens,
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**special, "image_token": IMAGE})


def read_texts(path: Path) -> Iterator[str]:
    """All text of the records of a file that preprocessing reads, apart from records that it rejects.

    Raises:
        DataError: the file is damaged, or a record is of no known format.
        UsageError: it needs a package that is not installed.
    """
    try:
        with open_regular(path) as stream:
            start = stream.read(_START)
    except OSError as error:
        raise DataError(f"--input {path}: cannot be read ({error.strerror}); give a file of records") from error
    container = container_of(str(path), start=start)
    for split in divide_file(str(path), container=container, size=_SPLIT_BYTES) if start else ():
        for entry in entries(split):
            yield from _texts_of(entry, format="webdataset" if container == "tar" else None, where=str(path))


def _texts_of(entry: Entry, *, format: str | None, where: str) -> Iterator[str]:
    content = entry.content
    if isinstance(content, bytes) and not content.strip():
        return
    try:
        if isinstance(content, RecordError):
            raise content
        raw = parse_json(content) if isinstance(content, bytes) else content
        record = read_record(raw, format=format, columns={})
    except RecordError as error:
        if error.reason not in ("json", "record"):
            return
        raise DataError(f"{where}:{entry.position}: {error}; repair or remove the record") from error
    yield from (turn.text.replace(IMAGE, "") for turn in record.turns)
    yield from (part for part in record.parts if isinstance(part, str))
