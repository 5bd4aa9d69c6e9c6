"""The keys of a recipe with their defaults and meaning, read from the dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from megavl.config.load import dataclass_in
from megavl.config.recipe import Recipe


def key_lines() -> list[str]:
    """One line for each section of a recipe, and for each key: dotted path, default, choices, first sentence."""
    first = "base: another recipe file, relative to this one, whose values this one replaces."
    return [first, *_section(Recipe, path="")]


def _section(cls: Any, *, path: str) -> Iterator[str]:
    """The keys of one dataclass, then the sections below it."""
    sections = []
    for field in dataclasses.fields(cls):
        kind = cls.__pydantic_fields__[field.name].annotation
        inner = dataclass_in(kind)
        if inner is None:
            text = _choices(kind) + _summary(_description(cls, field.name))
            yield f"  {path + field.name:<36} {_default(cls, field.name):<14} {text}".rstrip()
        else:
            below = f"{path}{field.name}" + (".NAME" if get_origin(kind) is tuple else "")
            sections.append((inner, below))
    for inner, below in sections:
        yield f"\n{below}: {_summary(inner.__doc__ or '')}"
        yield from _section(inner, path=f"{below}.")


def _default(cls: Any, name: str) -> str:
    info = cls.__pydantic_fields__[name]
    if info.is_required():
        return "of the preset" if cls.__module__ == "megavl.config.model" and name != "preset" else "required"
    default = info.default
    if default is None or default == ():
        return "none"
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _description(cls: Any, name: str) -> str:
    """The docstring under a field, in the class or in a base of it."""
    known = (getattr(base, "__pydantic_fields__", {}).get(name) for base in cls.__mro__)
    return next((info.description for info in known if info is not None and info.description), "")


def _choices(kind: Any) -> str:
    return f"{' | '.join(map(str, get_args(kind)))}. " if get_origin(kind) is Literal else ""


def _summary(text: str) -> str:
    """The first sentence, and the one that explains the default."""
    sentences = " ".join(text.split()).rstrip(".").split(". ")
    kept = [s for number, s in enumerate(sentences) if s and (number == 0 or s.startswith("Default:"))]
    return "".join(f"{s}. " for s in kept).rstrip()
