"""Which script a text is written in: Chinese characters or letters. No language is guessed beyond that."""

from __future__ import annotations

from typing import Literal

Script = Literal["latin", "chinese"]

CHINESE_SHARE = 0.2
"""Share of Chinese characters among a text's letters from which it counts as Chinese; a character is about a word."""

LOOKED_AT = 100_000
"""Characters."""

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def is_han(character: str) -> bool:
    """Whether a character is a Chinese one."""
    code = ord(character)
    return code >= 0x3400 and any(first <= code <= last for first, last in _HAN)


def script_of(text: str) -> Script:
    """Chinese when at least a fifth of the letters at its beginning are Chinese characters."""
    han = letters = 0
    for character in text[:LOOKED_AT]:
        if character.isalpha():
            letters += 1
            han += is_han(character)
    return "chinese" if letters and han >= CHINESE_SHARE * letters else "latin"
