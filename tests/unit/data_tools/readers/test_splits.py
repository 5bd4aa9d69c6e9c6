"""Dividing input files between records."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.readers import json_file
from data_tools.readers.json_file import divide_json, json_position_kind, json_records
from megavl.config.errors import DataError, UsageError

JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=20) | st.sampled_from(['"', "\\", '\\"', "[{", "}],"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=15),
    indent=st.sampled_from([None, 1]),
    array=st.booleans(),
    size=st.integers(1, 400),
    block=st.integers(16, 200),
)
def test_records_are_the_same_for_any_split(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    items: list[Any],
    indent: int | None,
    array: bool,
    size: int,
    block: int,
) -> None:
    monkeypatch.setattr(json_file, "_BLOCK", block)
    path = tmp_path / "data"
    text = (
        json.dumps(items, indent=indent, ensure_ascii=False) if array else "".join(f"{json.dumps(i)}\n" for i in items)
    )
    path.write_text(text, encoding="utf-8")
    parts = divide_json(path, size=size)
    found = [(position, json.loads(raw or b"")) for part in parts for position, raw in json_records(part)]
    assert found == list(enumerate(items, start=1))
    assert sum(part.records for part in parts) == len(items)
    limited = divide_json(path, size=size, limit=4)
    assert [json.loads(raw or b"") for part in limited for _, raw in json_records(part)] == items[:4]


def test_lines_of_bare_lists_are_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text('[{"role": "User"}]\n[{"role": "User"}]\n')
    assert json_position_kind(path) == "line"
    path.write_text('[{"role": "User"},\n {"role": "User"}]\n')
    assert json_position_kind(path) == "item"


def test_truncated_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, {"a": "x')
    with pytest.raises(DataError, match=r"data\.json: the JSON array .* never ends"):
        divide_json(path, size=10)
    path.write_text('[{"a": 1},\n {"a": 2}]\n[3]')
    with pytest.raises(DataError, match="more text after the JSON array"):
        divide_json(path, size=10)


def test_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.jsonl: cannot read"):
        divide_json(tmp_path / "gone.jsonl", size=10)


def test_huge_record_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_RECORD", 50)
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * 60 + '"}\n{"text": "c"}\n')
    found = [raw is not None for part in divide_json(path, size=10) for _, raw in json_records(part)]
    assert found == [True, False, True]
