"""Text of an answer while its tokens arrive."""

from __future__ import annotations

from megavl.data.tokenizer import Tokenizer
from megavl.generate.prompt import answer_text

_INCOMPLETE = "\ufffd"
"""What decoding gives for bytes that are no character, or not one yet."""


class TextStream:
    """Gives out what a new token makes certain; all parts together are the text of the whole answer.

    A character of UTF-8 may take several tokens of a byte-level vocabulary, so an end that is not a character is held
    back until it is one, or can no longer become one. Every token decodes the whole answer again: spaces between words
    depend on what stands before them, and decoding costs a thousandth of the token itself.
    """

    def __init__(self, tokenizer: Tokenizer, *, strip: bool = False) -> None:
        """An empty answer; with `strip`, white space around it is left out."""
        self.shown = ""
        """What has been given out."""
        self._ids: list[int] = []
        self._tokenizer, self._strip = tokenizer, strip

    def add(self, token: int) -> str:
        """Text that this token makes certain; often empty."""
        self._ids.append(token)
        # White space at the end may turn out to be the end of the answer, which is stripped.
        return self._show(self._text().rstrip(_INCOMPLETE))

    def end(self) -> str:
        """What was held back."""
        return self._show(self._text())

    def _text(self) -> str:
        return answer_text(self._ids, tokenizer=self._tokenizer)

    def _show(self, text: str) -> str:
        new = (text.strip() if self._strip else text)[len(self.shown) :]
        self.shown += new
        return new
