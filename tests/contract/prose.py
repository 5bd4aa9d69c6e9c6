"""Sentences of READMEs and docstrings, and what is wrong with them.

`python tests/contract/prose.py PATH...` lists the long sentences and the avoided words of files or folders.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

LONGEST = 40
LONG = 25
MAX_LONG_SHARE = 0.05
AVOIDED = {
    r"behind": "after",
    r"for ever": "forever, or say what ends it",
    r"stretch(es)?": "split or byte range",
    r"anchors?": "dummy image",
    r"cuts?": "layout, split or truncate",
    r"(?<!\bin )(?<!\btake )(?<!\btakes )(?<!\btakes the )(?<!\btake the )places?": "line, index or position",
}


def sentences_of_markdown(text: str) -> list[str]:
    """Sentences of running text and list items; code blocks, tables and headings are left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not re.match(r"\s*([|#<]|\[!)", line)]
    return _sentences("\n".join(lines))


def sentences_of_python(source: str) -> list[str]:
    """Sentences of every docstring, those under attributes included."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or isinstance(node, ast.Lambda):
            continue
        for item in body:
            if (
                isinstance(item, ast.Expr)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            ):
                found += _sentences(_without_code(item.value.value))
    return found


def _without_code(docstring: str) -> str:
    """The docstring without tables and without indented lines of code."""
    return re.sub(r"^(\s*\|.*| {4,}\S.*[\\={}(].*)$", "", docstring, flags=re.MULTILINE)


def _sentences(text: str) -> list[str]:
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    # A blank line, a list item and a field of a docstring each begin a sentence.
    text = re.sub(r"\n\s*\n|\n\s*(?:[-*]|\d+\.)\s|\n\s+(?=[\w, *`]+: )", "\n\n", text)
    found = []
    for paragraph in text.split("\n\n"):
        joined = " ".join(paragraph.split())
        found += [part for part in re.split(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*\[]?[A-Z0-9`])", joined) if part]
    return found


def words(sentence: str) -> int:
    """How many words a sentence has; a name in code is one."""
    return len(re.findall(r"[^\W_][\w'.,/%-]*", sentence))


def avoided(sentence: str) -> Iterator[str]:
    """What to say instead of each avoided word in a sentence."""
    for pattern, instead in AVOIDED.items():
        for match in re.finditer(rf"\b{pattern}\b", sentence, re.IGNORECASE):
            yield f"'{match.group(0)}': say {instead}"


def sentences(path: Path) -> list[str]:
    """Sentences of a Markdown or Python file."""
    read = sentences_of_markdown if path.suffix == ".md" else sentences_of_python
    return read(path.read_text(encoding="utf-8"))


def main(paths: Iterable[str]) -> None:
    """Print what is wrong, and the share of long sentences."""
    counts = []
    for root in map(Path, paths):
        inside = sorted(path for end in ("py", "md") for path in root.rglob(f"*.{end}") if path.is_file())
        for path in [root] if root.is_file() else inside:
            for sentence in sentences(path):
                counts.append(words(sentence))
                notes = [f"{counts[-1]} words"] * (counts[-1] > LONG) + list(avoided(sentence))
                if notes:
                    print(f"{path}: {'; '.join(notes)}: {sentence[:110]}")
    long = sum(count > LONG for count in counts)
    print(f"{len(counts)} sentences, {long} over {LONG} words ({long / max(1, len(counts)):.1%})")


if __name__ == "__main__":
    main(sys.argv[1:])
