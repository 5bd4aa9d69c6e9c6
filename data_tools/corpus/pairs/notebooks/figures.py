"""Notebooks as data: code cells and the figures stored below them. Nothing here runs any of that code."""

from __future__ import annotations

import base64
import binascii
import warnings
from dataclasses import dataclass
from typing import Any

FEWEST_LINES = 5
"""Lines of code below which a figure's cell says too little (paper, section 2)."""
LONGEST_CODE = 20_000
"""Characters."""


class NotebookError(Exception):
    """A file that is no notebook."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A code cell."""

    number: int
    """Among all cells, from 1."""
    code: str
    figures: tuple[bytes, ...]
    """PNG files of its stored outputs, unchecked."""


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """What is taken from a notebook."""

    language: str
    """Programming language, as the notebook names it; `python` where it does not."""
    cells: tuple[Cell, ...]


def read_notebook(text: str) -> Notebook:
    """Parse a notebook of any format version.

    Raises:
        NotebookError: it is none.
    """
    import nbformat

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = nbformat.reads(text, as_version=4)
        metadata = content.get("metadata", {})
        language = metadata.get("kernelspec", {}).get("language") or metadata.get("language_info", {}).get("name")
        cells = tuple(
            Cell(number=number, code=_text(cell.get("source")), figures=_figures(cell.get("outputs")))
            for number, cell in enumerate(content["cells"], start=1)
            if cell.get("cell_type") == "code"
        )
    except Exception as error:  # foreign files fail in every way
        raise NotebookError(f"{type(error).__name__}: {error}") from error
    return Notebook(language=str(language or "python").lower()[:40], cells=cells)


def code_lines(code: str) -> int:
    """Lines that do something: neither empty, nor comment, nor a command of the notebook itself."""
    lines = (line.strip() for line in code.split("\n"))
    return sum(bool(line) and not line.startswith(("#", "%", "!", "?")) for line in lines)


def reason_against(cell: Cell, *, figures: int) -> str | None:
    """Why a cell with some figures makes no record: the word under which it is counted, or None."""
    if figures > 1:
        return "many_images"
    if code_lines(cell.code) < FEWEST_LINES:
        return "few_lines"
    return "code_too_long" if len(cell.code) > LONGEST_CODE else None


def _text(value: Any) -> str:
    return "".join(value) if isinstance(value, list) else str(value or "")


def _figures(outputs: Any) -> tuple[bytes, ...]:
    found = []
    for output in outputs or []:
        if output.get("output_type") in ("display_data", "execute_result"):
            encoded = output.get("data", {}).get("image/png")
            if encoded:
                found.append(_decoded(_text(encoded)))
    return tuple(found)


def _decoded(encoded: str) -> bytes:
    """The file, or nothing where the encoding is broken: the image check then rejects it."""
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""
