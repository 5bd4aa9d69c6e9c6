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
    kind: Literal["a", 1] = "a"
    parts: tuple[Part, ...]
    colour: tuple[int, int, int]
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    packed: bool = True


CONTENT: dict[str, Any] = {
    "kind": 1,
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
        ({"more": 1}, "more: unknown; the fields are kind, parts"),
        ({"kind": True}, r"kind: found True, must be 'a' or 1"),
        ({"kind": []}, r"kind: found \[\]"),
        ({"parts": {}}, r"parts: found {}, must be a list"),
        ({"parts": "ab"}, "parts: found 'ab', must be a list"),
        ({"parts": ["ab"]}, "parts.0: found 'ab', must be an object"),
        ({"parts": [{"name": "x"}]}, "parts.0.size: missing"),
        ({"parts": [{"name": "x", "size": "3"}]}, "parts.0.size: found '3', must be of type int"),
        ({"parts": [{"name": "x", "size": True}]}, "parts.0.size: found True, must be of type int"),
        ({"parts": [{"name": None, "size": 3}]}, "parts.0.name: found None, must be of type str"),
        ({"colour": [1, 2]}, "colour: has 2 entries, must have 3"),
        ({"colour": [1, 2, 3.0]}, "colour.2: found 3.0"),
        ({"counts": {"images": None}}, "counts.images: found None"),
        ({"counts": []}, r"counts: found \[\], must be an object"),
        ({"packed": 0}, "packed: found 0, must be of type bool"),
    ],
)
def test_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        typed(Whole, CONTENT | changes)


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_what_is_no_object_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match=r"^the whole: found .*, must be an object"):
        typed(Whole, content)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ValueError) as found:
        typed(Whole, CONTENT | {"kind": "x" * 10_000, "more": 1} | {"y" * 10_000: 2})
    assert len(str(found.value)) < 300
