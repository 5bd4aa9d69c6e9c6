"""Tokenizers in both published forms: a Hugging Face `tokenizer.json` and a SentencePiece `.model`.

Special tokens are inserted by id, never by their text: a document that spells `</s>` gets ordinary tokens.
A long text is tokenized in parts where that gives the same ids (`text_parts.py`), so that its memory is bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import sentencepiece
import tokenizers

from megavl.config.chat import IMAGE_TOKEN
from megavl.config.errors import DataError, UsageError
from megavl.data.control_tokens import (
    Declared,
    companion,
    declared_beside,
    roles_of_model,
    separate_json,
    separate_model,
)
from megavl.data.manifest import TokenizerEntry
from megavl.data.model_borders import model_borders
from megavl.data.text_parts import AHEAD, LONG, divides_words, inner_ends, require_short, safe_borders, word_borders
from megavl.data.text_parts import parts as text_parts
from megavl.data.word_cache import WordCache
from megavl.foreign.panics import panics_as_errors
from megavl.foreign.parsing import LARGE_JSON_FILE, parse_json
from megavl.foreign.reading import read_limited

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
_HUB_NAME = re.compile(
    r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?(?P<name>(?:[\w-][\w.-]*/)?[\w-][\w.-]*?)"
    r"(?:/|/(?:tree|blob|resolve)/.*)?"
)
"""Name or page of a repository; the oldest ones, such as `gpt2`, have no owner."""


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
    control_ids: frozenset[int]
    """What text never gives, whatever it spells."""
    _borders: re.Pattern[str] | None = None
    """Where a text may be divided."""
    _words: WordCache | None = None
    """Remembers words, where texts may be divided into them."""
    _skipped = 0
    """Characters after a border that the library adds by itself."""
    _longest: int
    """Most bytes of UTF-8 that the library takes in one go, in 300 to 400 MB of memory."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text in one piece."""

    @abstractmethod
    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text in one piece, and the character at which each begins."""

    def _encode_word(self, word: str) -> array[int] | None:
        """Ids of a long text without borders, or None if they are not found in parts."""
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; those of a long text take less memory from `encode_long`.

        Raises:
            DataError: a text gives a control token all the same, or is too long and cannot be tokenized in parts.
        """
        found: list[list[int]] = []
        for group in _groups(texts):
            if len(group[0]) > LONG:
                found += [[token for ids in self.encode_long(text) for token in ids] for text in group]
                continue
            for ids in self._encode(group):
                self._check(ids)
                found.append(ids)
        return found

    def encode_similar(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """As `encode_batch`, for texts of at most LONG characters that are like those before them.

        Raises:
            DataError: as for `encode_batch`.
        """
        if self._words is not None:
            try:
                return [*self._words.encode_batch(texts)]
            except DataError:
                # What is wrong is said about the whole text.
                pass
        return [*self.encode_batch(texts)]

    def divides_at(self, text: str, position: int) -> bool:
        """Whether it is known that the ids of a text are those of its two sides."""
        return self._words is not None and self._words.divides_at(text, position)

    def encode_long(self, text: str) -> Iterator[Sequence[int]]:
        """Ids of successive parts of a text.

        Raises:
            DataError: as for `encode_batch`.
        """
        for start, end in text_parts(text, borders=self._borders):
            part = text[start + self._skipped * bool(start) : end]
            ids: Sequence[int] | None = self._encode_word(part) if len(part) > LONG else None
            if ids is None:
                (ids,) = self._encode([require_short(part, longest=self._longest)])
            self._check(ids)
            yield ids

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the joined parts, and for each id the number of the part in which its text begins.

        Raises:
            DataError: as for `encode_batch`.
        """
        text = "".join(parts)
        ends = list(accumulate(map(len, parts)))
        found: list[int] = []
        owners: list[int] = []
        for start, end in text_parts(text, borders=self._borders):
            first = start + self._skipped * bool(start)
            ids, starts = self._encode_with_starts(require_short(text[first:end], longest=self._longest))
            self._check(ids)
            found += ids
            # The first token of a part also stands for what the library adds.
            begins = [start, *(first + begin for begin in starts[1:])]
            owners += [min(bisect_right(ends, begin), len(ends) - 1) for begin in begins[: len(ids)]]
        return found, owners

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    def _set_specials(
        self, declared: Declared, *, find: Callable[[str], int | None], known: Iterable[str], unknown: int | None
    ) -> None:
        """Set the ids of special tokens; `known` are all names of control tokens, `unknown` is what strange text gives.

        Raises:
            DataError: there is no end-of-sentence token.
        """
        bos_id, eos_id, pad_id = (declared.id_of(f"{role}_token", find=find) for role in ("bos", "eos", "pad"))
        if eos_id is None:
            raise DataError(f"{self.path}: no end-of-sentence token; name eos_token in tokenizer_config.json beside it")
        self.bos_id, self.eos_id, self.image_id = bos_id, eos_id, find(IMAGE_TOKEN)
        self.pad_id = eos_id if pad_id is None else pad_id
        controls = {find(name) for name in known} - {unknown} | {bos_id, eos_id, self.image_id}
        self.control_ids = frozenset(token for token in controls if token is not None)

    def _without_controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token not in self.control_ids]

    def _check(self, ids: Sequence[int]) -> None:
        """Refuse what the changes of `control_tokens.py` cannot prevent, such as an unknown token that is also EOS."""
        if not self.control_ids.isdisjoint(ids):
            raise DataError(f"the text itself yields the control token id {min(self.control_ids.intersection(ids))}")

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

    _longest = 2 << 20

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = _read(path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        declared = declared_beside(path.parent)
        try:
            content = parse_json(raw, limit=LARGE_JSON_FILE)
            known = separate_json(content, declared=declared)
            self._borders = safe_borders(content)
            if (borders := word_borders(content)) is not None:
                self._words = WordCache(borders, encode=self.encode_batch)
            self._divides_words = self._borders is not None and divides_words(content)
            with panics_as_errors():
                self._inner = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        except Exception as error:  # the library raises bare Exception, and any JSON comes this far
            raise DataError(f"{path}: not a Hugging Face tokenizer ({error}); give a tokenizer.json") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self.files = tuple(file for name in _COMPANIONS if (file := companion(path.parent, name))) or (path,)
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        model = content["model"]
        unknown = self._inner.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
        self._set_specials(
            declared, find=lambda name: self._inner.token_to_id(known.get(name, name)), known=known, unknown=unknown
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        with self._tokenizing():
            return [e.ids for e in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        with self._tokenizing():
            encoding = self._inner.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    @contextmanager
    def _tokenizing(self) -> Iterator[None]:
        try:
            with panics_as_errors():
                yield
        except ValueError as error:
            raise DataError(f"{self.path}: cannot tokenize a text ({error}); give another tokenizer") from None

    def _encode_word(self, word: str) -> array[int] | None:
        if not self._divides_words:
            return None
        found = array("i")
        start = 0
        while start < len(word):
            for end in inner_ends(word, start=start):
                (ids,) = self._encode([word[start:end]])
                (following,) = self._encode([word[end : end + AHEAD]])
                if ids and (end == len(word) or self._stay_apart(ids[-1:], following[:1])):
                    break
            else:
                return None
            # Looked at again, because fewer characters were tokenized then.
            if found and not self._stay_apart([found[-1]], ids[:1]):
                return None
            found.extend(ids)
            start = end
        return found

    def _stay_apart(self, before: list[int], after: list[int]) -> bool:
        """Whether no merge crosses the border between two tokens."""
        pair = [*before, *after]
        names = [self._inner.id_to_token(token) or "" for token in pair]
        return [token.id for token in self._inner.model.tokenize("".join(names))] == pair

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self._inner.decode(self._without_controls(ids), skip_special_tokens=True)
        return text


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    _longest = 8 << 20

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        raw = _read(path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        declared = declared_beside(path.parent)
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=raw)
            pieces = {model.id_to_piece(token): token for token in range(model.vocab_size())}
            roles = {role: name for role, name in roles_of_model(raw).items() if name in pieces}
            declared = replace(declared, roles=roles | declared.roles)
            known = declared.names_in(pieces)
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=separate_model(raw, controls=known))
            borders = model_borders(raw)
        except (RuntimeError, OSError, LookupError, ValueError) as error:
            raise DataError(f"{path}: not a SentencePiece model; give a .model file or a tokenizer.json") from error
        if borders is not None:
            self._borders, self._skipped = borders.pattern, int(borders.prefixed)
        self.vocab_size = len(pieces)
        controls = {name for name, token in pieces.items() if self._inner.is_control(token)}
        self._set_specials(declared, find=pieces.get, known=known | controls, unknown=self._inner.unk_id())

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self._inner.encode(texts, num_threads=1)]

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        pieces = self._inner.encode(text, return_type="proto").pieces
        # Offsets of SentencePiece count bytes of UTF-8.
        ends = list(accumulate(len(char.encode("utf-8")) for char in text))
        return [piece.id for piece in pieces], [bisect_right(ends, piece.begin) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self._inner.decode(self._without_controls(ids))
        return text


def tokenizer_in(folder: Path) -> Path:
    """Path of the tokenizer in a checkpoint's folder; a SentencePiece file has kept its name there."""
    models = sorted(folder.glob("*.model"))
    return models[0] if len(models) == 1 and not (folder / "tokenizer.json").is_file() else folder


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.

    Args:
        path: folder with `tokenizer.json` or `tokenizer.model`, or one such file.

    Raises:
        DataError: neither is found, or the file is not a tokenizer with an end-of-sentence token.
        UsageError: the path is the name of a repository on the Hugging Face Hub.
    """
    given, path = str(path), Path(path)
    if not os.path.lexists(path) and (name := _hub_name(given)):
        raise UsageError(
            f"{given}: no such tokenizer; correct the path, or if it is on the Hugging Face Hub, fetch it first: "
            f"hf download {name} --include 'tokenizer*' --local-dir {Path(name).name} "
            f"(then give {Path(name).name})"
        )
    if path.is_dir():
        found = [file for name in ("tokenizer.json", "tokenizer.model") if (file := companion(path, name))]
        if not found:
            raise DataError(
                f"{path}: neither tokenizer.json nor tokenizer.model in this folder; give a tokenizer's path"
            )
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; give a folder with tokenizer.json, or a SentencePiece .model")
    return SentencePieceTokenizer(path) if path.suffix == ".model" else HuggingFaceTokenizer(path)


def _hub_name(path: str) -> str | None:
    """The repository that a path without a file may name."""
    found = _HUB_NAME.fullmatch(path)
    # `runs/tokenizer` looks like such a name as well; where `runs` is a folder, a file is meant.
    if found is None or path.endswith((".json", ".model")) or (os.sep in path and Path(path).parent.is_dir()):
        return None
    return found["name"]


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Successive texts that go through the library together; a long text alone."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > LONG:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _read(path: Path) -> bytes:
    try:
        return read_limited(path, limit=LARGE_JSON_FILE.size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read the tokenizer ({reason}); give a readable file") from error
