"""The part of the HTML that a screenshot can show when nothing is fetched and no script runs."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

_NEVER_SHOWN = frozenset(("script", "template"))
"""Removed with their contents."""
_EMBEDDING = frozenset(("iframe", "object", "embed", "applet", "frame", "frameset", "audio", "video"))
"""These show other documents and media; removed with their contents."""
_WITHOUT_EFFECT = frozenset(("link", "base"))
"""Removed: they refer to files that are not fetched."""
_VOID = frozenset(("embed", "frame", "link", "base", "meta"))
_UNREAD = frozenset(("style", "title"))
"""The text of these elements is not on the page."""
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+\n")


class _Cleaner(HTMLParser):
    """Copies the HTML unchanged except for the removed elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.kept: list[str] = []
        self.words: list[str] = []
        self.removed = ""
        self.depth = 0
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.removed:
            self.depth += tag == self.removed
        elif tag in _NEVER_SHOWN | _EMBEDDING and tag not in _VOID:
            self.removed, self.depth = tag, 1
        elif tag not in _WITHOUT_EFFECT | _EMBEDDING and not (tag == "meta" and "http-equiv" in dict(attrs)):
            self.kept.append(self.get_starttag_text() or "")
            if tag in _UNREAD:
                self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self.removed and tag not in _WITHOUT_EFFECT | _EMBEDDING | _NEVER_SHOWN:
            self.kept.append(self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        if self.removed:
            self.depth -= tag == self.removed
            if not self.depth:
                self.removed = ""
        elif tag not in _EMBEDDING | _NEVER_SHOWN:
            self.kept.append(f"</{tag}>")
            if self.inside and self.inside[-1] == tag:
                self.inside.pop()

    def handle_data(self, data: str) -> None:
        self._keep(data, data)

    def handle_entityref(self, name: str) -> None:
        self._keep(f"&{name};", unescape(f"&{name};"))

    def handle_charref(self, name: str) -> None:
        self._keep(f"&#{name};", unescape(f"&#{name};"))

    def handle_decl(self, decl: str) -> None:
        self._keep(f"<!{decl}>", "")

    def _keep(self, source: str, words: str) -> None:
        if not self.removed:
            self.kept.append(source)
            if not self.inside:
                self.words.append(words)


def shown_source(html: str) -> tuple[str, str]:
    """The HTML without scripts, comments, embedded documents and references to other files; and its running text."""
    cleaner = _Cleaner()
    cleaner.feed(html)
    cleaner.close()
    return _BLANK_LINES.sub("\n\n", "".join(cleaner.kept)).strip() + "\n", "".join(cleaner.words)
