"""JSON values as frozen dataclasses, every field checked against its type.

It serves manifests, which every command reads. pydantic serves recipes, whose messages and bounds need more; importing
it takes a quarter of a second, as much as all that a short preprocessing run does.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_SHOWN = 100
"""Most characters of a wrong value that a message shows."""


def typed(kind: type[T], content: object) -> T:
    """An instance of a dataclass from what `json.loads` gives.

    Args:
        kind: its fields are str, int, bool, literals, dataclasses, tuples, dicts with text as keys, or one of these or
            None.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message begins with its dotted path.
    """
    return cast(T, _record(kind, content, at=""))


def _record(kind: Any, content: object, *, at: str) -> Any:
    if not isinstance(content, dict):
        raise _wrong(content, "an object", at=at)
    hints = _hints(kind)
    for name in content:
        if name not in hints:
            raise ValueError(f"{at}{str(name)[:_SHOWN]}: unknown; the fields are {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in content:
            raise ValueError(f"{at}{field.name}: missing")
    return kind(**{name: _value(hints[name], value, at=f"{at}{name}.") for name, value in content.items()})


def _value(kind: Any, value: Any, *, at: str) -> Any:
    """`value`, if it is of this kind; `at` is its dotted path, with a dot at its end."""
    origin, kinds = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, at=at)
    if origin is UnionType:
        (other,) = (one for one in kinds if one is not NoneType)
        return None if value is None else _value(other, value, at=at)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(value, "a list", at=at)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{at[:-1]}: has {len(value)} entries, must have {len(kinds)}")
        return tuple(_value(one, part, at=f"{at}{number}.") for number, (one, part) in enumerate(zip(kinds, value)))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(value, "an object", at=at)
        return {key: _value(kinds[1], part, at=f"{at}{str(key)[:_SHOWN]}.") for key, part in value.items()}
    # True equals 1, so types are compared too.
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in kinds):
            raise _wrong(value, " or ".join(map(repr, kinds)), at=at)
    elif type(value) is not kind:
        raise _wrong(value, f"of type {kind.__name__}", at=at)
    return value


def _wrong(value: object, wanted: str, *, at: str) -> ValueError:
    return ValueError(f"{at[:-1] or 'the whole'}: found {repr(value)[:_SHOWN]}, must be {wanted}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
