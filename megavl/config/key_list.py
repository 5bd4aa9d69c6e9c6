"""The keys of a recipe with their defaults and meaning, read from the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
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
    return next((found for base in cls.__mro__ if (found := _docstrings(base).get(name))), "")


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """What stands under each field of a class; read here alone, because reading source code takes long."""
    if not dataclasses.is_dataclass(cls):
        return {}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef), "the source of a class is a class"
    return {
        field.target.id: text.value.value
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _choices(kind: Any) -> str:
    return f"{' | '.join(map(str, get_args(kind)))}. " if get_origin(kind) is Literal else ""


def _summary(text: str) -> str:
    """The first sentence, and the one that explains the default."""
    sentences = " ".join(text.split()).rstrip(".").split(". ")
    kept = [s for number, s in enumerate(sentences) if s and (number == 0 or s.startswith("Default:"))]
    return "".join(f"{s}. " for s in kept).rstrip()
