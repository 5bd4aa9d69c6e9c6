"""Script of a text: Chinese or Latin. The language is not detected further."""

from __future__ import annotations

from typing import Literal

Script = Literal["latin", "chinese"]

MIN_CHINESE_SHARE = 0.2
"""A text with this share of Chinese characters among its letters is Chinese; one character is about one word."""

CHARACTERS_READ = 100_000
"""Number of characters at the start of a text that decide."""

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def is_han(character: str) -> bool:
    """Whether a character is Chinese."""
    code = ord(character)
    return code >= 0x3400 and any(first <= code <= last for first, last in _HAN)


def script_of(text: str) -> Script:
    """Chinese if at least a fifth of the letters at the start of the text are Chinese, else Latin."""
    han = letters = 0
    for character in text[:CHARACTERS_READ]:
        if character.isalpha():
            letters += 1
            han += is_han(character)
    return "chinese" if letters and han >= MIN_CHINESE_SHARE * letters else "latin"
