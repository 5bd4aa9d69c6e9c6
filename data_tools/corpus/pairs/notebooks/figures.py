"""Notebooks as data: code cells and the figures stored in their outputs. None of that code is ever run."""

from __future__ import annotations

import base64
import binascii
import warnings
from dataclasses import dataclass
from typing import Any

MIN_LINES = 5
"""A cell with fewer lines of code says too little about its figure (paper, section 2)."""
MAX_CODE_CHARACTERS = 20_000


class NotebookError(Exception):
    """The file is not a notebook."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A code cell."""

    number: int
    """Position among all cells, from 1."""
    code: str
    figures: tuple[bytes, ...]
    """PNG files of its stored outputs, unchecked."""


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """Language and code cells of a notebook."""

    language: str
    """Programming language that the notebook states; `python` if it states none."""
    cells: tuple[Cell, ...]


def read_notebook(text: str) -> Notebook:
    """Parse a notebook of any format version.

    Raises:
        NotebookError: the text is not a notebook.
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
    except Exception as error:  # a malformed file can raise any exception
        raise NotebookError(f"{type(error).__name__}: {error}") from error
    return Notebook(language=str(language or "python").lower()[:40], cells=cells)


def code_lines(code: str) -> int:
    """Number of lines without empty lines, comments and notebook commands."""
    lines = (line.strip() for line in code.split("\n"))
    return sum(bool(line) and not line.startswith(("#", "%", "!", "?")) for line in lines)


def reason_against(cell: Cell) -> str | None:
    """Why a cell with figures makes no record, as the reason to count; None if it makes one."""
    if len(cell.figures) > 1:
        return "many_images"
    if code_lines(cell.code) < MIN_LINES:
        return "few_lines"
    return "code_too_long" if len(cell.code) > MAX_CODE_CHARACTERS else None


def _text(value: Any) -> str:
    text = "".join(value) if isinstance(value, list) else str(value or "")
    text.encode("utf-8")  # a lone surrogate could not be written
    return text


def _figures(outputs: Any) -> tuple[bytes, ...]:
    found = []
    for output in outputs or []:
        if output.get("output_type") in ("display_data", "execute_result"):
            encoded = output.get("data", {}).get("image/png")
            if encoded:
                found.append(_decoded(_text(encoded)))
    return tuple(found)


def _decoded(encoded: str) -> bytes:
    """The file, or no bytes if the encoding is broken; the image check then rejects it."""
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""
