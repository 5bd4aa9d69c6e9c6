"""Remembers the ids of words: a text of any language repeats most of them, and a library looks at each one anew.

Only words between borders where a tokenizer divides a text in any case have ids of their own (`text_parts.py`).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain

from megavl.data.text_parts import word_pattern

_KEPT = 1 << 16
"""Words that are remembered, in about 15 MB."""
_LONGEST = 64
"""Characters of a word that is remembered."""


class WordCache:
    """The ids of words that occurred before."""

    def __init__(self, borders: str, *, encode: Callable[[list[str]], list[list[int]]]) -> None:
        """`borders` are those between words; `encode` gives the ids of words."""
        self._find = word_pattern(borders).findall
        self._border = re.compile(borders)
        self._encode = encode
        self._known: dict[str, bytes] = {}

    def divides_at(self, text: str, position: int) -> bool:
        """Whether a text has a border between words there."""
        return self._border.match(text, position) is not None

    def encode_batch(self, texts: Sequence[str]) -> list[array[int]]:
        """Ids of each text."""
        known = self._known
        words_of = list(map(self._find, texts))
        all_words = dict.fromkeys(chain.from_iterable(words_of))
        found = {word: known[word] for word in all_words if word in known}
        new = [word for word in all_words if word not in found]
        fresh = {word: array("i", ids).tobytes() for word, ids in zip(new, self._encode(new))}
        found |= fresh
        known.update((word, ids) for word, ids in fresh.items() if len(word) <= _LONGEST)
        if len(known) > _KEPT:
            # The words of these texts are those that come again most probably.
            self._known = {word: ids for word, ids in found.items() if len(word) <= _LONGEST}
        return [array("i", b"".join(map(found.__getitem__, words))) for words in words_of]
