"""Documents in Markdown, HTML and LaTeX as trees, and formulas as typst code; both by pandoc, which may open no file.

pandoc is run with `--sandbox` (no file, no network), a bounded heap and a time limit, as a separate program.
"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from typing import Any

from data_tools.corpus.pairs.documents.wording import Formulas, Node, formula_key, formula_source
from megavl.config.errors import UsageError

READERS = {
    "markdown": "gfm-alerts",
    "html": "html+tex_math_single_backslash",
    "latex": "latex",
}
"""pandoc's reader by our name of the format; `text` is read without pandoc."""

SECONDS = 30
"""Time for one document."""
OLDEST = (3, 1, 2)
"""pandoc's first version with a writer for typst."""
_HEAP = ["+RTS", "-M1g", "-RTS"]
_BORDER = "%%megavl formula %%"


class ReadingError(Exception):
    """A document that pandoc cannot read."""


@cache
def pandoc() -> str:
    """Path of the program.

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


def read_tree(text: str, *, format: str) -> list[Node]:
    """The blocks of a document.

    Raises:
        ReadingError: not in that format, too deep, or too much for the limits.
    """
    output = _run(["--from", READERS[format], "--to", "json"], text)
    try:
        return list(json.loads(output)["blocks"])
    except RecursionError as error:
        raise ReadingError("too deeply nested") from error


def formulas_in(node: Any) -> dict[str, Node]:
    """Every formula below a node, by `formula_key`."""
    found: dict[str, Node] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            if current.get("t") == "Math":
                found[formula_key(current)] = current
            waiting.extend(current.values())
        elif isinstance(current, list):
            waiting.extend(current)
    return found


def convert_formulas(found: dict[str, Node]) -> Formulas:
    """Typst code of the formulas; those that pandoc does not understand are left out.

    Raises:
        ReadingError: all of them together are too much for the limits.
    """
    if not found:
        return {}
    blocks: list[Node] = []
    for node in found.values():
        bare = {"t": "Math", "c": [node["c"][0], formula_source(node)]}
        blocks += [{"t": "Para", "c": [bare]}, {"t": "RawBlock", "c": ["typst", _BORDER]}]
    tree = {"pandoc-api-version": _api_version(), "meta": {}, "blocks": blocks}
    output = _run(["--from", "json", "--to", "typst"], json.dumps(tree))
    pieces = [piece.strip() for piece in output.split(_BORDER)][:-1]
    if len(pieces) != len(found):
        raise ReadingError("a formula spells the border between formulas")
    # What pandoc cannot convert it writes as text, with its dollars escaped.
    good = re.compile(r"\$(?:[^$\\\"]|\\.|\"(?:[^\"\\]|\\.)*\")*\$", re.DOTALL)
    return {key: piece for key, piece in zip(found, pieces, strict=True) if good.fullmatch(piece)}


@cache
def _api_version() -> list[int]:
    return list(json.loads(_run(["--from", "gfm", "--to", "json"], ""))["pandoc-api-version"])


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
