"""Dividing input files between records."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.readers import splits
from data_tools.readers.splits import divide, places_of, records
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
def test_records_come_back_whatever_the_borders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    items: list[Any],
    indent: int | None,
    array: bool,
    size: int,
    block: int,
) -> None:
    monkeypatch.setattr(splits, "_BLOCK", block)
    path = tmp_path / "data"
    text = (
        json.dumps(items, indent=indent, ensure_ascii=False) if array else "".join(f"{json.dumps(i)}\n" for i in items)
    )
    path.write_text(text, encoding="utf-8")
    parts = divide(path, size=size)
    found = [(place, json.loads(raw or b"")) for part in parts for place, raw in records(part)]
    assert found == list(enumerate(items, start=1))
    assert sum(part.records for part in parts) == len(items)
    limited = divide(path, size=size, limit=4)
    assert [json.loads(raw or b"") for part in limited for _, raw in records(part)] == items[:4]


def test_lines_of_bare_lists_are_no_array(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text('[{"role": "User"}]\n[{"role": "User"}]\n')
    assert places_of(path) == "line"
    path.write_text('[{"role": "User"},\n {"role": "User"}]\n')
    assert places_of(path) == "item"


def test_array_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, {"a": "x')
    with pytest.raises(DataError, match=r"data\.json: the JSON array .* never ends"):
        divide(path, size=10)
    path.write_text('[{"a": 1},\n {"a": 2}]\n[3]')
    with pytest.raises(DataError, match="more text after the JSON array"):
        divide(path, size=10)


def test_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.jsonl: cannot read"):
        divide(tmp_path / "gone.jsonl", size=10)


def test_huge_record_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MAX_RECORD", 50)
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * 60 + '"}\n{"text": "c"}\n')
    found = [raw is not None for part in divide(path, size=10) for _, raw in records(part)]
    assert found == [True, False, True]
