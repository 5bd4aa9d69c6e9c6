"""Pandoc parses Markdown, HTML and LaTeX into trees, and converts formulas to typst code.

It runs as a separate program with `--sandbox` (no file, no network), a bounded heap and a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

from data_tools.corpus.pairs.documents.elements import Formulas, Node, formula_key, formula_source
from megavl.config.errors import UsageError

READERS = {
    "markdown": "gfm-alerts",
    "html": "html+tex_math_single_backslash",
    "latex": "latex",
}
"""Pandoc's reader for each format; `text` is read without pandoc."""

SECONDS = 30
"""Time limit for one document."""
OLDEST = (3, 1, 2)
"""The first pandoc with a typst writer."""
_HEAP = ["+RTS", "-M1g", "-RTS"]
_SEPARATOR = "%%megavl formula %%"


class ReadingError(Exception):
    """Pandoc cannot read the document."""


@cache
def pandoc() -> str:
    """Path of pandoc.

    Raises:
        UsageError: it is not installed, or too old.
    """
    remedy = "pip install 'megavl[corpus]'"
    try:
        import pypandoc

        version = tuple(int(part) for part in pypandoc.get_pandoc_version().split("."))
    except (ImportError, OSError) as error:
        raise UsageError(f"pandoc is not installed; {remedy}") from error
    if version < OLDEST:
        raise UsageError(f"pandoc {'.'.join(map(str, version))} is older than 3.1.2; {remedy}")
    return str(pypandoc.get_pandoc_path())


def read_tree(text: str, *, format: str) -> tuple[list[Node], Formulas]:
    """The blocks of a document, and the typst code of its formulas, without those that pandoc cannot convert.

    Raises:
        ReadingError: the text is not in that format, too deeply nested, or too large for the limits.
    """
    output = _run(["--from", READERS[format], "--to", "json"], text)
    try:
        tree = json.loads(output)
    except RecursionError as error:
        raise ReadingError("too deeply nested") from error
    return tree["blocks"], _convert_formulas(tree)


def _convert_formulas(tree: dict[str, Any]) -> Formulas:
    found = {formula_key(node): node for node in _formulas_in(tree["blocks"])}
    if not found:
        return {}
    blocks: list[Node] = []
    for node in found.values():
        bare = {"t": "Math", "c": [node["c"][0], formula_source(node)]}
        blocks += [{"t": "Para", "c": [bare]}, {"t": "RawBlock", "c": ["typst", _SEPARATOR]}]
    output = _run(["--from", "json", "--to", "typst"], json.dumps({**tree, "meta": {}, "blocks": blocks}))
    pieces = [piece.strip() for piece in output.split(_SEPARATOR)][:-1]
    if len(pieces) != len(found):
        raise ReadingError("a formula contains the separator of formulas")
    # Pandoc writes a formula that it cannot convert as text with escaped dollars.
    good = re.compile(r"\$(?:[^$\\\"]|\\.|\"(?:[^\"\\]|\\.)*\")*\$", re.DOTALL)
    return {key: piece for key, piece in zip(found, pieces, strict=True) if good.fullmatch(piece)}


def _formulas_in(node: Any) -> Iterator[Node]:
    """Every formula below a node."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            if current.get("t") == "Math":
                yield current
            waiting.extend(current.values())
        elif isinstance(current, list):
            waiting.extend(current)


def _run(options: list[str], text: str) -> str:
    try:
        done = subprocess.run(
            [pandoc(), "--sandbox", *_HEAP, *options],
            input=text.encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ReadingError(f"took more than {SECONDS} s") from error
    if done.returncode:
        raise ReadingError(done.stderr.decode("utf-8", "replace").strip() or f"pandoc ended with {done.returncode}")
    return done.stdout.decode("utf-8")
