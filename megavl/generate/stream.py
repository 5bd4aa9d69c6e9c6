"""Text of an answer while its tokens arrive."""

from __future__ import annotations

from megavl.data.tokenizer import Tokenizer
from megavl.generate.prompt import answer_text
from megavl.generate.stop import StopTexts

_INCOMPLETE = "\ufffd"
"""Decoding gives this for bytes that are not a complete character."""


class TextStream:
    """Text pieces that a new token makes certain; together they are the text of the answer.

    A UTF-8 character may take several tokens of a byte-level vocabulary. An incomplete character at the end is held
    back until it is complete, or the answer ends. Every token decodes the whole answer again, because spaces depend on
    the text before them. That costs a thousandth of computing the token.
    """

    def __init__(self, tokenizer: Tokenizer, *, strip: bool = False, stop: StopTexts | None = None) -> None:
        """An empty answer; with `strip`, white space around it is left out; it ends before a stop text."""
        self.shown = ""
        """The text so far, without what is held back."""
        self._ids: list[int] = []
        self._tokenizer, self._strip = tokenizer, strip
        self._stop = stop or StopTexts((), tokenizer)

    def add(self, token: int) -> str:
        """Text that this token makes certain; often empty."""
        self._ids.append(token)
        # White space at the end may turn out to be the end of the answer, which is stripped.
        return self._show(self._stop.certain(self._text().rstrip(_INCOMPLETE)))

    def end(self) -> str:
        """The text that was held back."""
        return self._show(self._stop.truncate(self._text()))

    def _text(self) -> str:
        return answer_text(self._ids, tokenizer=self._tokenizer)

    def _show(self, text: str) -> str:
        new = (text.strip() if self._strip else text)[len(self.shown) :]
        self.shown += new
        return new
