"""Short phrases out of texts: one to four words, or a few Chinese characters that stand together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from data_tools.corpus.scripts import Script

MOST_PHRASES = 300_000
"""Of one script; more add nothing to a set of images."""
LONGEST_WORD = 16
LONGEST_PHRASE = 28
"""Characters."""
MOST_WORDS = 4
HAN_RUN = (2, 8)
"""Chinese characters of one phrase, fewest and most."""

_HAN = re.compile(r"[\u4e00-\u9fff]{2,}")
_AROUND = ".,;:!?()[]{}<>\"'`“”‘’«»*_|#~=^\\/"
"""Signs that are cut off either end of a word."""


def phrases_of(text: str, *, script: Script) -> Iterator[str]:
    """Phrases of a text, in its order; their lengths follow from the words themselves, not from chance."""
    if script == "chinese":
        for run in _HAN.findall(text):
            start = 0
            while start + HAN_RUN[0] <= len(run):
                length = HAN_RUN[0] + _draw(run[start : start + 2], HAN_RUN[1] - HAN_RUN[0] + 1)
                yield run[start : start + length]
                start += length
        return
    for line in text.split("\n"):
        words = [word for raw in line.split() if (word := raw.strip(_AROUND)) and _is_word(word)]
        start = 0
        while start < len(words):
            count = 1 + _draw(words[start], MOST_WORDS)
            phrase = " ".join(words[start : start + count])
            if len(phrase) <= LONGEST_PHRASE:
                yield phrase
            start += count


def _is_word(word: str) -> bool:
    return len(word) <= LONGEST_WORD and word.isprintable() and any(character.isalnum() for character in word)


def _draw(text: str, count: int) -> int:
    """A number below `count` that depends on the text alone."""
    return hashlib.sha256(text.encode()).digest()[0] % count
