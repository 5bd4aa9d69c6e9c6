"""The text that each token of a sequence adds, and names for tokens that have none of their own."""

from __future__ import annotations

from collections.abc import Iterable

from megavl.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class TokenTexts:
    """Text pieces of successive tokens; together they are the text of the sequence.

    A token is decoded after the last few before it, because spaces depend on them. A character that takes several
    tokens belongs to the one that completes it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """An empty sequence."""
        self._tokenizer = tokenizer
        self._window: list[int] = []
        """Tokens of the last piece, which give context, and those without a piece yet."""
        self._context = 0
        """How many of these are context."""

    def add(self, token: int) -> str:
        """The text that this token adds; empty for a special token and inside a character."""
        if not self._has_text(token):
            return ""
        piece = self._piece(token)
        self._window.append(token)
        if piece and not piece.endswith(_INCOMPLETE):
            del self._window[: self._context]
            self._context = len(self._window)
            return piece
        return ""

    def label(self, token: int) -> str:
        """How a token would be shown as the next one: its text, or `token_id:N`."""
        piece = self._piece(token) if self._has_text(token) else ""
        return piece if piece and _INCOMPLETE not in piece else f"token_id:{token}"

    def labels(self, tokens: Iterable[int]) -> dict[int, str]:
        """Different labels for different tokens."""
        found: dict[int, str] = {}
        for token in tokens:
            label = self.label(token)
            found[token] = f"token_id:{token}" if label in found.values() else label
        return found

    def _has_text(self, token: int) -> bool:
        return token < self._tokenizer.vocab_size and token not in self._tokenizer.control_ids

    def _piece(self, token: int) -> str:
        before = self._tokenizer.decode(self._window[: self._context])
        return self._tokenizer.decode([*self._window, token])[len(before) :]
