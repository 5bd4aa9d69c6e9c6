"""Prompts from JSON lines, checked before any of them is answered."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megavl.config.errors import DataError
from megavl.generate.json_lines import existing_images, read_lines


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class _Line:
    prompt: str
    images: tuple[str, ...] = ()
    system: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    id: str | int | None = None


_LINE = TypeAdapter(_Line)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a file."""

    location: str
    """`file:line`, for messages."""
    text: str
    images: tuple[Path, ...]
    system: str | None
    """System text of this prompt; None for the command's."""
    seed: int | None
    """Seed of this answer's draws; None for the command's."""
    id: str | int | None
    """Printed with the answer."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file, in order.

    Args:
        path: JSONL file of `{"prompt", "images", "system", "seed", "id"}`, of which only the prompt must be given;
            images are relative to the file.

    Raises:
        DataError: the file is missing or holds no prompt, or a line is malformed; the message gives file:line.
    """
    path = Path(path)
    prompts = [_prompt(line, path=path, location=location) for location, line in read_lines(path, what="prompts")]
    if not prompts:
        raise DataError(f"{path}: no prompt in it; give a JSONL file with one prompt a line")
    return prompts


def _prompt(text: str, *, path: Path, location: str) -> Prompt:
    try:
        line = _LINE.validate_json(text)
    except ValidationError as error:
        raise DataError(f"{location}: {_explain(error)}") from None
    images = existing_images(line.images, path=path, location=location)
    return Prompt(location=location, text=line.prompt, images=images, system=line.system, seed=line.seed, id=line.id)


def _explain(error: ValidationError) -> str:
    known = [field.name for field in fields(_Line)]
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return f"{key}: unknown key{f'; did you mean {nearest[0]!r}?' if nearest else '; known: ' + ', '.join(known)}"
    found = "" if first["type"] in ("missing", "json_invalid") else f", found {str(first['input'])[:80]!r}"
    return (
        f"{key + ': ' if key else ''}{first['msg']}{found}; a line is one JSON object with prompt, and images, system, "
        "seed and id where it has them"
    )
