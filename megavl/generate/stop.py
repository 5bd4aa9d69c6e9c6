"""Texts at which an answer ends."""

from __future__ import annotations

from collections.abc import Sequence

from megavl.config.errors import UsageError
from megavl.data.tokenizer import Tokenizer
from megavl.generate.prompt import answer_text


class StopTexts:
    """Ends an answer before the first of some texts, wherever its tokens split them."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        """No text may be empty.

        Raises:
            UsageError: one is.
        """
        if not all(texts):
            raise UsageError("stop: a text to stop at is empty; leave it out")
        self.texts, self._tokenizer = tuple(texts), tokenizer
        # A token holds at least one byte, but for special tokens, which have no text.
        self._tail = max((len(text.encode()) for text in texts), default=0) + 8

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether one of the texts stands at the end of an answer, perhaps followed by the rest of its last token."""
        return bool(self.texts) and self._first(answer_text(ids[-self._tail :], tokenizer=self._tokenizer)) >= 0

    def truncate(self, text: str) -> str:
        """The text before the first stop text."""
        at = self._first(text)
        return text if at < 0 else text[:at]

    def certain(self, text: str) -> str:
        """The part of an unfinished answer's text that no stop text can reach any more."""
        text = self.truncate(text)
        held = 0
        for stop in self.texts:
            ends = (size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size]))
            held = max(held, next(ends, 0))
        return text[: len(text) - held]

    def _first(self, text: str) -> int:
        found = [at for at in map(text.find, self.texts) if at >= 0]
        return min(found, default=-1)
