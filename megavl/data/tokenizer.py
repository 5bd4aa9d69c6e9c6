"""Tokenizers in both published forms: a Hugging Face `tokenizer.json` and a SentencePiece `.model`.

Special tokens are inserted by id, never by their text: a document that spells `</s>` gets ordinary tokens.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megavl.config.chat import IMAGE_TOKEN, USUAL_NAMES
from megavl.config.errors import DataError
from megavl.data.manifest import TokenizerEntry

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)


class Tokenizer(ABC):
    """Text to ids and back; no method adds BOS or EOS."""

    path: Path
    """The file that defines the vocabulary."""
    files: tuple[Path, ...]
    """What a checkpoint or an export copies, byte for byte."""
    sha256: str
    """Of `path`."""
    vocab_size: int
    """Largest id + 1."""
    bos_id: int | None
    eos_id: int
    pad_id: int
    """EOS where the tokenizer names no padding."""
    image_id: int | None
    """Id of `<image_placeholder>`; None in a tokenizer of text alone."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the joined parts, and for each id the number of the part in which its text begins."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    @property
    def entry(self) -> TokenizerEntry:
        """What manifests record."""
        return TokenizerEntry(
            sha256=self.sha256,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            image_id=self.image_id,
        )


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, with the names of its special tokens from the files beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = _read(path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            self._inner = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a Hugging Face tokenizer ({error}); give a tokenizer.json") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self.files = tuple(file for name in _COMPANIONS if (file := path.parent / name).is_file()) or (path,)
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        named = _named_specials(path.parent)
        self.bos_id = self._special("bos_token", named)
        eos_id, pad_id = self._special("eos_token", named), self._special("pad_token", named)
        if eos_id is None:
            raise DataError(f"{path}: no end-of-sentence token; name eos_token in tokenizer_config.json beside it")
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.image_id = self._inner.token_to_id(IMAGE_TOKEN)

    def _special(self, key: str, named: dict[str, str]) -> int | None:
        names = (named[key],) if key in named else USUAL_NAMES[key]
        ids = (self._inner.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the joined parts, and for each id the number of the part in which its text begins."""
        encoding = self._inner.encode("".join(parts), add_special_tokens=False)
        return encoding.ids, _part_of([start for start, _ in encoding.offsets], [len(part) for part in parts])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        raw = _read(path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model; give a .model file or a tokenizer.json") from error
        self.vocab_size = self._inner.vocab_size()
        bos_id, eos_id, pad_id = self._inner.bos_id(), self._inner.eos_id(), self._inner.pad_id()
        if eos_id < 0:
            raise DataError(f"{path}: no end-of-sentence token; train the model with an eos_id")
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = eos_id
        self.pad_id = pad_id if pad_id >= 0 else eos_id
        image_id = self._inner.piece_to_id(IMAGE_TOKEN)
        self.image_id = image_id if image_id != self._inner.unk_id() else None
        self._specials = {token for token in (bos_id, eos_id, pad_id, self.image_id) if token is not None}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [list(ids) for ids in self._inner.encode(list(texts), num_threads=1)]

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the joined parts, and for each id the number of the part in which its text begins."""
        pieces = self._inner.encode("".join(parts), return_type="proto").pieces
        # Offsets of SentencePiece count bytes of UTF-8.
        sizes = [len(part.encode("utf-8")) for part in parts]
        return [piece.id for piece in pieces], _part_of([piece.begin for piece in pieces], sizes)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self._inner.decode([token for token in ids if token not in self._specials])
        return text


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.

    Args:
        path: folder with `tokenizer.json` or `tokenizer.model`, or one such file.

    Raises:
        DataError: neither is found, or the file is not a tokenizer with an end-of-sentence token.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise DataError(
                f"{path}: neither tokenizer.json nor tokenizer.model in this folder; give a tokenizer's path"
            )
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; give a folder with tokenizer.json, or a SentencePiece .model")
    return SentencePieceTokenizer(path) if path.suffix == ".model" else HuggingFaceTokenizer(path)


def _part_of(starts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    ends = list(accumulate(sizes))
    return [min(bisect_right(ends, start), len(ends) - 1) for start in starts]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error.strerror}); give a readable file") from error


def _named_specials(folder: Path) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content: Any = json.loads(_read(file))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{file}: not valid JSON ({error}); restore the file") from error
        for key in USUAL_NAMES:
            value = content.get(key) if isinstance(content, dict) else None
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                named[key] = value
    return named
