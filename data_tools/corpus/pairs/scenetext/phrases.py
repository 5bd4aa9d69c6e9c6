"""Short phrases from texts: one to four words, or a few adjacent Chinese characters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from data_tools.corpus.scripts import Script

MAX_PHRASES = 300_000
"""Number of phrases of one script; more add nothing to a set of images."""
MAX_WORD_CHARACTERS = 16
MAX_PHRASE_CHARACTERS = 28
MAX_WORDS = 4
HAN_CHARACTERS = (2, 8)
"""Minimum and maximum number of Chinese characters in one phrase."""

_HAN = re.compile(r"[\u4e00-\u9fff]{2,}")
_STRIPPED = ".,;:!?()[]{}<>\"'`“”‘’«»*_|#~=^\\/"
"""Characters that are stripped from both ends of a word."""


def phrases_of(text: str, *, script: Script) -> Iterator[str]:
    """Phrases of a text in their order; the words themselves decide the lengths, not chance."""
    if script == "chinese":
        least, most = HAN_CHARACTERS
        for run in _HAN.findall(text):
            start = 0
            while start + least <= len(run):
                length = HAN_CHARACTERS[0] + _number_from(
                    run[start : start + 2], HAN_CHARACTERS[1] - HAN_CHARACTERS[0] + 1
                )
                yield run[start : start + length]
                start += length
        return
    for line in text.split("\n"):
        words = [word for raw in line.split() if (word := raw.strip(_STRIPPED)) and _is_word(word)]
        start = 0
        while start < len(words):
            count = 1 + _number_from(words[start], MAX_WORDS)
            phrase = " ".join(words[start : start + count])
            if len(phrase) <= MAX_PHRASE_CHARACTERS:
                yield phrase
            start += count


def _is_word(word: str) -> bool:
    return len(word) <= MAX_WORD_CHARACTERS and word.isprintable() and any(character.isalnum() for character in word)


def _number_from(text: str, count: int) -> int:
    """A number below `count` that depends on the text alone."""
    return hashlib.sha256(text.encode()).digest()[0] % count
