"""JSON and YAML from outside: what is beyond a limit is refused in bounded time, and plain files mean what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from megavl.foreign.parsing import JSON_FILE, parse_json
from megavl.foreign.reading import read_limited, regular_file_in
from megavl.foreign.yaml_text import YAML_FILE, parse_yaml

_ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
_MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))

BAD_JSON = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep after a string of brackets": b'["]]]]\\"]]]",' + b"[" * 900 + b"]" * 900 + b"]",
    "many values": b"[" + b"{}," * JSON_FILE.values + b"{}]",
    "endless string": b'"' + b"a" * JSON_FILE.size,
    "long integer": b"9" * 5000,
    "long fraction": b"0." + b"9" * 5000,
    "infinite": b"1e999",
    "NaN": b"NaN",
    "key twice": b'{"a": 1, "a": 2}',
    "lone surrogate": b'["\\ud800"]',
    "lone surrogate as a key": b'{"\\uDFFF": 1}',
    "not UTF-8": b'"\xff"',
    "byte-order mark": b"\xef\xbb\xbf{}",
    "empty": b"",
    "two values": b"1 2",
}
BAD_YAML = {
    "deep lists": "[" * 20_000,
    "deep objects": "{a: " * 20_000,
    "deep block": "- " * 20_000,
    "aliases": _ALIASES,
    "merges": _MERGES,
    "alias to itself": "a: &a [*a]",
    "long integer": "a: " + "9" * 5000,
    "sexagesimal": "a: 1" + ":1" * 100_000,
    "binary digits": "a: 0b" + "1" * 5000,
    "impossible date": "a: 2026-13-45",
    "many values": "[" + "a," * YAML_FILE.values + "]",
    "large": "#" * (YAML_FILE.size + 1),
    "tag of Python": "a: !!python/object/apply:os.system [x]",
    "empty integer": "a: !!int ''",
    "no boolean": "a: !!bool x",
    "no timestamp": "a: !!timestamp x",
    "list as a key": "? [a]\n: 1",
    "escape character": "a: \x1b",
}


@pytest.mark.parametrize("raw", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(raw)


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_yaml(text)
    assert len(str(error.value)) < 1000


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@settings(max_examples=30)
@given(_JSON, st.booleans())
def test_json_is_read_as_by_the_library(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        text.decode("utf-8")
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        return
    assert parse_json(text) == value


def test_yaml_is_read_as_by_the_library() -> None:
    text = "a: &x {b: [1, 1_000, 0x1f, 2.5, .inf, 2026-01-02, ~, yes]}\nc: {<<: *x, d: 'e'}\n? f\n: |\n  g\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes, at most 1,000"):
        read_limited(path, limit=1000)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


KINDS: dict[str, Callable[[Path], None]] = {
    "FIFO": _fifo,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "long link": lambda path: path.symlink_to("x" * 300),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_base_recipe_must_be_a_regular_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "base.yaml")
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\n")
    with pytest.raises(UsageError, match=r"base\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "text", ["base: [a]", "base: {a: b}", 'base: "\\0"', f"base: {'x' * 5000}", "1: 2", "a: {1: 2}"]
)
def test_odd_recipe_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError):
        load_recipe(tmp_path / "recipe.yaml")


def test_links_stay_inside_their_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "f00").write_text("{}")
    (snapshot / "inner").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "other.json").symlink_to("inner")
    (snapshot / "merges.txt").symlink_to(secret)
    (snapshot / "vocab.json").symlink_to("../../../secret")
    assert regular_file_in(snapshot, "absent") is None
    assert all(regular_file_in(snapshot, name) for name in ("config.json", "other.json", "inner"))
    for name in ("merges.txt", "vocab.json"):
        with pytest.raises(ValueError, match=f"a link to {secret}, outside"):
            regular_file_in(snapshot, name)


REPEATED = (
    *("a: 1\nb: 2\na: 3", "x: {a: 1, a: 1}", "x:\n  - {'a': 1, \"a\": 2}"),
    *("true: 1\nyes: 2", "1: a\n0x1: b", "x: &a a\n*a : 1\n*a : 2"),
)


@pytest.mark.parametrize("text", REPEATED)
def test_repeated_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"the key '(a|yes|0x1)' stands in line . and again in line ."):
        parse_yaml(text)


def test_merged_keys_may_be_replaced() -> None:
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\n1: one\n'1': text"
    assert parse_yaml(text) == {"x": {"a": 1, "b": 2}, "y": {"a": 3, "b": 2}, 1: "one", "1": "text"}
