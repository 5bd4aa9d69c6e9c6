"""Keeps control tokens out of text, however a tokenizer declares them.

A text that spells `</s>` must give ordinary tokens. Each library promises that for one kind of declaration: special
added tokens of a `tokenizer.json`, control symbols of a SentencePiece model. Every other declaration is changed to that
kind here, before the library reads the tokenizer. Ids stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavl.config.chat import IMAGE_TOKEN, USUAL_NAMES
from megavl.config.errors import DataError
from megavl.foreign.parsing import read_json
from megavl.foreign.reading import regular_file_in

_DECLARATIONS = ("special_tokens_map.json", "tokenizer_config.json")
_USUAL = frozenset({IMAGE_TOKEN, *(name for names in USUAL_NAMES.values() for name in names)})
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Types of SentencePiece symbols."""
_MODEL_ROLES = {46: ("bos_token", "<s>"), 47: ("eos_token", "</s>"), 48: ("pad_token", "<pad>")}
"""Fields of a SentencePiece TrainerSpec that name special tokens, and their defaults."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What the files beside a tokenizer say about its special tokens."""

    roles: dict[str, str]
    """Names by the keys of USUAL_NAMES, such as `eos_token`."""
    controls: frozenset[str]
    """Further names that never come out of text."""

    def id_of(self, role: str, *, find: Callable[[str], int | None]) -> int | None:
        """Id of the token with a role, a key of USUAL_NAMES; `find` gives the id of a name."""
        names = (self.roles[role],) if role in self.roles else USUAL_NAMES[role]
        return next((token for name in names if (token := find(name)) is not None), None)

    def names_in(self, vocabulary: Container[str]) -> set[str]:
        """All names of a vocabulary that never come out of text."""
        usual = {IMAGE_TOKEN, *self.roles.values()}
        for role, names in USUAL_NAMES.items():
            if role not in self.roles:
                usual.update([name for name in names if name in vocabulary][:1])
        return {name for name in self.controls | usual if name in vocabulary}


def declared_beside(folder: Path) -> Declared:
    """Read `special_tokens_map.json` and `tokenizer_config.json` of a folder, where they exist.

    Raises:
        DataError: one of them is unreadable or no JSON.
    """
    roles: dict[str, str] = {}
    controls: set[str] = set()
    for name in _DECLARATIONS:
        file = companion(folder, name)
        if file is None:
            continue
        content = _parsed(file)
        for key, value in content.items():
            names = list(_names(value)) if key.endswith(("_token", "special_tokens")) else []
            controls.update(names)
            if key in USUAL_NAMES and names:
                roles[key] = names[0]
        tokens = content.get("added_tokens_decoder")
        for token in tokens.values() if isinstance(tokens, dict) else ():
            if isinstance(token, dict) and token.get("special"):
                controls.update(_names(token))
    return Declared(roles=roles, controls=frozenset(controls))


def companion(folder: Path, name: str) -> Path | None:
    """The file of this name in a tokenizer's folder; None if there is none.

    Raises:
        DataError: it is a link that leaves the folder, or no regular file.
    """
    try:
        return regular_file_in(folder, name)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name}: refused, {error}") from error


def separate_json(content: dict[str, Any], *, declared: Declared) -> dict[str, str]:
    """Change a parsed `tokenizer.json` so that its model and its added tokens never give a control token for text.

    Added tokens become special. A control token that is in the vocabulary of the model as well gets a name there that
    no merge builds.

    Args:
        content: the parsed file, changed in place.
        declared: names from the files beside it. Special added tokens count too, and added tokens of a usual name.

    Returns:
        The names of control tokens that the tokenizer has, with those under which it knows them from now on.
    """
    added = content.get("added_tokens") or []
    model = content["model"]
    vocabulary = model["vocab"]
    # Unigram lists its pieces with their scores; the other models map tokens to ids.
    ids = vocabulary if isinstance(vocabulary, dict) else {row[0]: number for number, row in enumerate(vocabulary)}
    names = {token["content"] for token in added if token["special"] or token["content"] in _USUAL}
    names |= declared.names_in(ids.keys() | {token["content"] for token in added})
    # Text cannot do without a single character, whatever else it stands for.
    names = {name for name in names if len(name) > 1}
    # Noncharacters, which no text is made of. A text that spells this name all the same is refused by its id.
    renamed = {name: f"\ufdd0{ids[name]}\ufdd0" for name in sorted(names & ids.keys())}
    # Looking through a large vocabulary takes a quarter of a second.
    if renamed and isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(name, name): number for name, number in vocabulary.items()}
    elif renamed:
        model["vocab"] = [[renamed.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if renamed and model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if renamed.keys().isdisjoint(_merged(merge, prefix))]
    known = dict(renamed)
    for token in added:
        if (name := token["content"]) in names:
            token["special"] = True
            token["content"] = known.setdefault(name, name)
    return known


def separate_model(raw: bytes, *, controls: Iterable[str]) -> bytes:
    """A SentencePiece model in which control tokens are control symbols, which text never gives.

    Args:
        raw: a model that the library could read.
        controls: names of control tokens. User-defined symbols of a usual name count too.
    """
    names, usual = ({name.encode("utf-8") for name in group if len(name) > 1} for group in (controls, _USUAL))
    out = bytearray()
    for number, field, start, end in fields(raw):
        # A ModelProto holds its symbols as field 1: text (1), score (2) and type (3), which is NORMAL where absent.
        if number == 1:
            parts = {inner: raw[start:end][first:last] for inner, _, first, last in fields(raw[start:end])}
            kind = parts.get(3, bytes([_NORMAL]))[0]
            if kind == _NORMAL and parts.get(1) in names or kind == _USER_DEFINED and parts.get(1) in names | usual:
                # Of two values the last one counts.
                symbol = raw[start:end] + bytes([3 << 3, _CONTROL])
                out += bytes([1 << 3 | 2]) + _varint(len(symbol)) + symbol
                continue
        out += raw[field:end]
    return bytes(out)


def roles_of_model(raw: bytes) -> dict[str, str]:
    """Names of special tokens by the keys of USUAL_NAMES, as a SentencePiece model states them.

    The library gives no id for a user-defined symbol in such a role.
    """
    roles = dict(_MODEL_ROLES.values())
    for number, _, start, end in fields(raw):
        # A ModelProto holds its TrainerSpec as field 2.
        for inner, _, first, last in fields(raw[start:end]) if number == 2 else ():
            if inner in _MODEL_ROLES:
                roles[_MODEL_ROLES[inner][0]] = raw[start:end][first:last].decode("utf-8")
    return roles


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except OSError as error:
        raise DataError(f"{file}: cannot read the tokenizer ({error.strerror}); give a readable file") from error
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error}); restore the file") from error
    return content if isinstance(content, dict) else {}


def _names(value: object) -> Iterator[str]:
    """Names in a declaration: a string, `{content}`, or a list or an object of these."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield from _names(value["content"])
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _names(item)


def _merged(merge: str | list[str], prefix: str) -> Iterable[str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)


def fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Number, first byte, first byte of the value and end of each field of a protocol buffer."""
    position = 0
    while position < len(data):
        field = position
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == 0:
            start = position
            _, position = _read_varint(data, position)
        else:
            size, start = _read_varint(data, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
            position = start + size
        yield tag >> 3, field, start, position


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
