"""Positions at which a long text can be divided for a SentencePiece model of kind BPE, with the ids of the whole text.

The model sees no words: it normalizes the whole text, writes spaces as `▁`, and merges what its vocabulary holds. A
position between a Latin letter and a single space before another letter divides the text if all of this is true:

- No rule of the normalizer reaches across. Its rules are the keys of a trie: none has an ASCII character after its
  first one, and none begins with a space.
- No symbol of the vocabulary holds the letter followed by `▁`. Each merge builds such a symbol, so none crosses.
- The library puts the `▁` of the second part there by itself (`add_dummy_prefix`), or keeps its space.

A Unigram model adds up the scores of a whole text in single precision, so its ids may depend on the length of the text.
It takes each text in one piece.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megavl.data.control_tokens import fields

_BPE = 2
_SPACE = "\u2581"


class ModelBorders(NamedTuple):
    """Where texts may be divided."""

    pattern: re.Pattern[str]
    """Matches end at a border."""
    prefixed: bool
    """Whether the library puts a space before each part, so that its own is left out."""


def model_borders(raw: bytes) -> ModelBorders | None:
    """Borders for a SentencePiece model that the library could read; None if there are none."""
    pieces = list(_pieces(raw))
    trainer, normalizer = _last_field(raw, 2), _last_field(raw, 3)
    prefixed, strips, escapes = (_flag(normalizer, number, default=True) for number in (3, 4, 5))
    kind = int.from_bytes(_last_field(trainer, 3) or b"\1", "little")
    unproven = not escapes or (strips and not prefixed) or _flag(trainer, 24, default=False)
    if kind != _BPE or unproven or any(" " in piece for piece in pieces) or _SPACE not in pieces:
        return None
    ruled = _first_characters(_last_field(normalizer, 2))
    if ruled is None or " " in ruled:
        return None
    joined = {found[0] for piece in pieces for found in re.findall(f"[A-Za-z]{_SPACE}", piece)}
    letters = "".join(sorted({*string.ascii_letters} - joined - ruled))
    return ModelBorders(re.compile(f"(?<=[{letters}])(?= [A-Za-z])"), prefixed) if letters else None


def _first_characters(charsmap: bytes) -> set[str] | None:
    """ASCII characters that a rule changes alone; None where a rule has one after its first character.

    Args:
        charsmap: size of a double-array trie (darts-clone), the trie as 32-bit units, and the texts of the rules.
    """
    if not charsmap:
        return set()
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4 : 4 + size // 4 * 4], "<u4").astype(np.int64)
    # A node's child for a byte stands at the node's offset, xor the byte, and has the byte as its label.
    labels, ends_rule = units & 0x800000FF, (units >> 8) & 1 == 1
    is_node = (units < 1 << 31) & (units >> 10 > 0)
    offsets = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    ascii_units = np.flatnonzero((labels > 0) & (labels < 128))
    parents = ascii_units ^ labels[ascii_units]
    if np.isin(parents, offsets[1:][is_node[1:]]).any():
        return None
    firsts = ascii_units[parents == offsets[0]]
    return {chr(labels[unit]) for unit in firsts if ends_rule[unit] or labels[unit] == ord(" ")}


def _pieces(raw: bytes) -> Iterator[str]:
    for number, _, start, end in fields(raw):
        if number == 1:
            yield _last_field(raw[start:end], 1).decode("utf-8")


def _flag(message: bytes, number: int, *, default: bool) -> bool:
    return bool((_last_field(message, number) or bytes([default]))[0])


def _last_field(message: bytes, number: int) -> bytes:
    """The value of a field of a protocol buffer, of which the last one counts; empty where it is absent."""
    found = b""
    for field, _, start, end in fields(message):
        if field == number:
            found = message[start:end]
    return found
