"""JSON values become dataclasses only if every field is there and has its type."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest

from megavl.foreign.typed import typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    size: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    kind: Literal["a", "b"] = "a"
    parts: tuple[Part, ...]
    colour: tuple[int, int, int]
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    packed: bool = True


CONTENT: dict[str, Any] = {
    "kind": "b",
    "parts": [{"name": "x", "size": 3}, {"name": "y", "size": None}],
    "colour": [1, 2, 3],
    "counts": {"images/found": 4},
    "packed": False,
}


def test_json_round_trip_gives_the_dataclass() -> None:
    whole = typed(Whole, CONTENT)
    assert whole.parts == (Part(name="x", size=3), Part(name="y", size=None))
    assert typed(Whole, json.loads(json.dumps(dataclasses.asdict(whole)))) == whole


def test_defaults_fill_missing_fields() -> None:
    assert typed(Whole, {"parts": [], "colour": [0, 0, 0]}) == Whole(parts=(), colour=(0, 0, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "more: Unexpected keyword argument, found 1"),
        ({"kind": "c"}, "kind: .*'a' or 'b'.*, found 'c'"),
        ({"kind": True}, "kind: .*, found True"),
        ({"kind": []}, r"kind: .*, found \[\]"),
        ({"parts": {}}, "parts: .*valid tuple, found {}"),
        ({"parts": "ab"}, "parts: .*valid tuple, found 'ab'"),
        ({"parts": ["ab"]}, "parts.0: .*, found 'ab'"),
        ({"parts": [{"name": "x"}]}, "parts.0.size: Field required$"),
        ({"parts": [{"name": "x", "size": "3"}]}, "parts.0.size: .*valid integer, found '3'"),
        ({"parts": [{"name": "x", "size": True}]}, "parts.0.size: .*valid integer, found True"),
        ({"parts": [{"name": "x", "size": 3.0}]}, "parts.0.size: .*valid integer, found 3.0"),
        ({"parts": [{"name": None, "size": 3}]}, "parts.0.name: .*valid string, found None"),
        ({"colour": [1, 2]}, "colour.2: Field required"),
        ({"colour": [1, 2, 3, 4]}, "colour: .*at most 3 items"),
        ({"colour": [1, 2, 3.0]}, "colour.2: .*, found 3.0"),
        ({"counts": {"images": None}}, "counts.images: .*, found None"),
        ({"counts": []}, r"counts: .*valid dictionary, found \[\]"),
        ({"packed": 0}, "packed: .*valid boolean, found 0"),
    ],
)
def test_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        typed(Whole, CONTENT | changes)


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_what_is_no_object_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="^the whole: .*, found "):
        typed(Whole, content)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ValueError) as found:
        typed(Whole, CONTENT | {"kind": "x" * 10_000, "more": 1} | {"y" * 10_000: 2})
    assert len(str(found.value)) < 300
