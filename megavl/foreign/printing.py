"""The one way in which commands print: control characters in the text of a file become visible symbols.

A terminal obeys escape sequences. So a file name or a model's answer could clear the screen, retitle the window or
hide the end of a line. Every character is looked at on its own, so a text may be printed in pieces.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import unicodedata
from typing import Any, NoReturn, TextIO

DETAIL = "\n  "
"""What begins another line in the message of an error."""
_JOINERS = "\u200c\u200d"
"""Parts of words in Persian and Indic scripts, and of emoji; they control nothing."""
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories: control, format (text direction too), surrogate, private, unassigned, line and paragraph."""


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Text with visible symbols instead of control characters; line feeds and tabs stay, or what `keep` names."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep or not _is_hidden(char) else _name(char) for char in text)


def say(*lines: object, end: str = "\n", to_errors: bool = False, keep: str = "\t") -> None:
    """Print one line for each argument, with control characters made visible, and flush.

    A line feed in an argument is that of a file's name or text, so it becomes visible too.

    Args:
        end: after the last line.
        keep: control characters that stay; a model's answer keeps its line feeds.
        to_errors: to standard error instead of standard output.
    """
    stream = sys.stderr if to_errors else sys.stdout
    text = "\n".join(visible(str(line), keep=keep) for line in lines) + end
    print(_encodable(text, stream), end="", file=stream, flush=True)


def say_error(error: object) -> None:
    """Print `error: ` and the message of an error, of which indented lines stay lines."""
    first, *details = str(error).split(DETAIL)
    say(f"error: {first}", *(f"  {detail}" for detail in details), to_errors=True)


class VisibleParser(argparse.ArgumentParser):
    """A parser of command lines whose messages cannot command the terminal."""

    def error(self, message: str) -> NoReturn:
        """End with code 2 and the usage."""
        super().error(visible(message, keep=""))


class VisibleFormatter(logging.Formatter):
    """Log lines with control characters made visible."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return visible(super().formatMessage(record), keep="\t")

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record, with the lines of a traceback."""
        return visible(super().format(record))


def json_line(value: Any) -> str:
    """JSON on one line. Letters of all scripts stay; what a terminal would obey is escaped, to the same value."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii() and text.isprintable():
        return text
    return "".join(json.dumps(char)[1:-1] if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN and char not in _JOINERS


def _name(char: str) -> str:
    return chr(0x2400 + ord(char)) if ord(char) < 0x20 else f"[U+{ord(char):04X}]"


def _encodable(text: str, stream: TextIO) -> str:
    """The text, with escapes for letters that a terminal of another encoding than UTF-8 lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
