"""JSON values as frozen dataclasses, every field checked against its type.

It serves manifests, which every command reads. pydantic checks them by its core alone: importing the rest of it, which
serves recipes, takes an eighth of a second and building its classes as much again.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic_core import CoreSchema, SchemaValidator, ValidationError, core_schema

T = TypeVar("T")

_SHOWN = 100
"""Most characters of a wrong value or name that a message shows."""
_PLAIN: dict[type, CoreSchema] = {
    str: core_schema.str_schema(strict=True),
    int: core_schema.int_schema(strict=True),
    bool: core_schema.bool_schema(strict=True),
}


def typed(kind: type[T], content: object) -> T:
    """An instance of a dataclass from what `json.loads` gives.

    Args:
        kind: its fields are str, int, bool, literal texts, dataclasses, tuples, dicts with text as keys, or one of
            these or None.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message begins with its dotted path.
    """
    try:
        return cast(T, _validator(cast(Any, kind)).validate_python(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part)[:_SHOWN] for part in first["loc"])
        found = "" if first["type"] == "missing" else f", found {repr(first['input'])[:_SHOWN]}"
        raise ValueError(f"{path or 'the whole'}: {first['msg'][: 2 * _SHOWN]}{found}") from error


@cache
def _validator(kind: type) -> SchemaValidator:
    return SchemaValidator(_schema(kind))


def _schema(kind: Any) -> CoreSchema:
    origin, kinds = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record_schema(cast(type, kind))
    if origin is UnionType:
        (other,) = (one for one in kinds if one is not NoneType)
        return core_schema.nullable_schema(_schema(other))
    if origin is Literal:
        return core_schema.literal_schema(list(kinds))
    if origin is dict:
        return core_schema.dict_schema(_PLAIN[str], _schema(kinds[1]))
    if origin is tuple:
        every = kinds[-1] is Ellipsis
        parts = [_schema(one) for one in kinds if one is not Ellipsis]
        return core_schema.tuple_schema(parts, variadic_item_index=0 if every else None)
    return _PLAIN[kind]


def _record_schema(kind: type) -> CoreSchema:
    hints, fields = get_type_hints(kind), dataclasses.fields(kind)
    rows = []
    for field in fields:
        schema = _schema(hints[field.name])
        if field.default is not dataclasses.MISSING:
            schema = core_schema.with_default_schema(schema, default=field.default)
        elif field.default_factory is not dataclasses.MISSING:
            schema = core_schema.with_default_schema(schema, default_factory=field.default_factory)
        rows.append(core_schema.dataclass_field(field.name, schema, kw_only=True))
    arguments = core_schema.dataclass_args_schema(kind.__name__, rows, extra_behavior="forbid")
    return core_schema.dataclass_schema(kind, arguments, [field.name for field in fields])
