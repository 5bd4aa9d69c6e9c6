"""Printing of text from files: a terminal gets nothing that it would obey."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.foreign.printing import DETAIL, VisibleParser, json_line, say, say_error, visible

COMMANDS = [
    "\x1b[2J",
    "\x9b2J",
    "\x9d0;title\x07",
    "\r",
    "\b",
    "\x7f",
    "\u202e",
    "\u2066",
    "\u200e",
    "\ud800",
    "\0",
    "\x85",
]


@pytest.mark.parametrize("command", COMMANDS, ids=ascii)
def test_commands_become_visible(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a{command}b", to_errors=True)
    shown = capsys.readouterr().err
    assert shown.startswith("a") and shown.endswith("b\n") and command[0] not in shown


def test_a_line_feed_in_a_name_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb", "c", end="")
    say_error(DETAIL.join(["wrong:", "a\nb", "c"]))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a␊b\nc", "error: wrong:\n  a␊b\n  c\n")
    with pytest.raises(SystemExit):
        VisibleParser(prog="p").parse_args(["\x1b[2J\n"])
    assert "arguments: ␛[2J␊" in capsys.readouterr().err


def test_letters_of_all_scripts_stay() -> None:
    text = "é 漢字 نمی\u200cخواهم 👩\u200d🚀 a\u0301\n\tx"
    assert visible(text) == text
    assert visible("a\nb", keep="") == "a␊b"


@settings(max_examples=30)
@given(st.text(), st.integers(0, 20))
def test_pieces_print_as_the_whole(text: str, at: int) -> None:
    assert visible(text[:at]) + visible(text[at:]) == visible(text)


@settings(max_examples=30)
@given(st.recursive(st.text() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_keeps_its_value(value: object) -> None:
    text = json_line(value)
    assert json.loads(text) == value
    assert visible(text, keep="") == text


def test_json_escapes_what_json_itself_does_not() -> None:
    assert json_line("\x9b\u202e\x7fé\ud800") == '"\\u009b\\u202e\\u007fé\\ud800"'


def test_terminal_without_the_letters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    say("é 漢")
    assert out.buffer.getvalue() == b"\\xe9 \\u6f22\n"  # type: ignore[attr-defined]
