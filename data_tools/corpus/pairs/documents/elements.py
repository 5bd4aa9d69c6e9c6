"""One element of a document in three forms: its typst code, its Markdown for the record, and its visible text.

One walk over pandoc's tree makes all three, so the record says what the page shows. Link addresses, comments, images
and footnotes are in none of them. Text reaches typst only inside string literals, so it is never run as code. The code
of formulas comes from pandoc's typst writer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_tools.corpus.scripts import is_han

Node = Any
"""A node of pandoc's JSON tree: {"t": type, "c": contents}."""
Formulas = Mapping[str, str]
"""Typst code of each TeX formula that pandoc could convert, by `formula_key`."""

_LABEL = re.compile(r"\\label\s*\{[^{}]*\}|\\(?:nonumber|notag)(?![a-zA-Z])")
_LINE_END = re.compile(r" *\n[ \n]*")
FORMULA = "\0"
"""Placeholder in `visible` for a formula, whose glyphs differ from its source."""


class Unusable(Exception):
    """An element that cannot be rendered; the message is the reason to count."""


@dataclass(frozen=True)
class Element:
    """The three forms of an element."""

    typst: str = ""
    markdown: str = ""
    visible: str = ""

    def __add__(self, other: Element) -> Element:
        return Element(self.typst + other.typst, self.markdown + other.markdown, self.visible + other.visible)


def formula_key(math: Node) -> str:
    """Kind and source of a formula."""
    return f"{math['c'][0]['t']}:{math['c'][1]}"


def formula_source(math: Node) -> str:
    """TeX of a formula without its invisible parts: labels and commands that suppress the number."""
    return _LABEL.sub("", math["c"][1]).strip()


def typst_string(text: str) -> str:
    """A typst string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'


def plain(text: str) -> Element:
    """Running text."""
    return Element(f"#{typst_string(text)};", text, text) if text else Element()


def marked_up(content: Element, *, function: str, before: str, after: str) -> Element:
    """Content inside a typst function, and between marks in Markdown."""
    if not content.visible.strip():
        return Element()
    return Element(f"#{function}[{content.typst}];", f"{before}{content.markdown}{after}", content.visible)


def code(text: str) -> Element:
    """Inline code."""
    fence = _fence(text, least=1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Element(f"#raw({typst_string(text)});", f"{fence}{pad}{text}{pad}{fence}", text)


def _fence(text: str, *, least: int) -> str:
    """Backticks that do not occur in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def inlines(nodes: list[Node], formulas: Formulas) -> Element:
    """Running text with its marks; adjacent words become one string.

    Raises:
        Unusable: an element has an unknown kind, or a formula cannot be converted.
    """
    result, run = Element(), ""
    shown = [node for node in nodes if node["t"] not in _INVISIBLE]
    filled = [index for index, node in enumerate(shown) if node["t"] not in _SPACES]
    for node in shown[filled[0] : filled[-1] + 1] if filled else []:
        words = _words(node)
        if words is not None:
            run = _joined(run, words)
        else:
            result, run = result + plain(run.replace("\n", " ")), ""
            result += _inline(node, formulas)
    result += plain(run.replace("\n", " "))
    return replace(result, markdown=_LINE_END.sub("\n", result.markdown).strip())


def _words(node: Node) -> str | None:
    kind = node["t"]
    if kind == "Str":
        return str(node["c"])
    if kind == "Space":
        return " "
    # A line end of the source; `_joined` turns it into a space or drops it.
    return "\n" if kind == "SoftBreak" else None


def _joined(run: str, words: str) -> str:
    """Text with one more word; a line end between Chinese characters is not a space."""
    if words.isspace() and run[-1:].isspace():
        return run
    if run.endswith("\n"):
        run = run[:-1] if len(run) > 1 and is_han(run[-2]) and is_han(words[0]) else f"{run[:-1]} "
    return run + words


def _inline(node: Node, formulas: Formulas) -> Element:
    kind, content = node["t"], node.get("c")
    if kind in _MARKS:
        function, before, after = _MARKS[kind]
        return marked_up(inlines(content, formulas), function=function, before=before, after=after)
    if kind in ("Underline", "SmallCaps"):
        return inlines(content, formulas)
    if kind in ("Link", "Span", "Cite"):
        return inlines(content[1], formulas)
    if kind == "Quoted":
        before, after = "‘’" if content[0]["t"] == "SingleQuote" else "“”"
        return plain(before) + inlines(content[1], formulas) + plain(after)
    if kind == "Code":
        return code(content[1])
    if kind == "Math":
        return _formula(node, formulas)
    if kind == "LineBreak":
        return Element("#linebreak();", "\n", " ")
    raise Unusable("element")


_INVISIBLE = ("Image", "Note", "RawInline")
"""Left out of page and record."""
_SPACES = ("Space", "SoftBreak", "LineBreak")
_MARKS: Mapping[str, tuple[str, str, str]] = {
    "Emph": ("emph", "*", "*"),
    "Strong": ("strong", "**", "**"),
    "Strikeout": ("strike", "~~", "~~"),
    "Superscript": ("super", "^{", "}"),
    "Subscript": ("sub", "_{", "}"),
}


def _formula(node: Node, formulas: Formulas) -> Element:
    source = formula_source(node)
    typst = formulas.get(formula_key(node))
    if typst is None:
        raise Unusable("formula")
    markdown = f"\n$${source}$$\n" if node["c"][0]["t"] == "DisplayMath" else f"${source}$"
    return Element(typst, markdown, FORMULA)


def paragraph(content: Element) -> Element:
    """Running text as an explicit paragraph, so that typst indents it; a display formula is no paragraph."""
    return content if "$$" in content.markdown else replace(content, typst=f"#par[{content.typst}]")


def heading(content: Element, *, level: int) -> Element:
    """A heading of level 1 to 6."""
    return Element(f"#heading(level: {level})[{content.typst}]", f"{'#' * level} {content.markdown}", content.visible)


def code_block(text: str, *, language: str) -> Element:
    """Lines of code; the language decides the colours and is not visible."""
    fence = _fence(text, least=3)
    named = f", lang: {typst_string(language)}" if language else ""
    return Element(f"#raw({typst_string(text)}, block: true{named})", f"{fence}\n{text}\n{fence}", text)


def rule() -> Element:
    """A horizontal line."""
    return Element("#line(length: 100%)", "---", "")


def quotation(content: Element) -> Element:
    """A quotation that contains blocks."""
    lines = "\n".join(f"> {line}".rstrip() for line in content.markdown.split("\n"))
    return Element(f"#quote(block: true)[{content.typst}]", lines, content.visible)


def listing(items: list[Element], *, start: int | None) -> Element:
    """A list, numbered from `start`, or with bullets."""
    numbers = ["" if start is None else f"{start + index}." for index in range(len(items))]
    parts = ", ".join(f"[{item.typst}]" for item in items)
    function = "list(" if start is None else f"enum(start: {start}, "
    lines = []
    for number, item in zip(numbers, items, strict=True):
        label = f"{number or '-'} "
        lines.append(label + item.markdown.replace("\n", "\n" + " " * len(label)))
    seen = " ".join(f"{number} {item.visible}" for number, item in zip(numbers, items, strict=True))
    markdown = "\n".join(line.rstrip() for line in "\n".join(lines).split("\n"))
    return Element(f"#{function}{parts})", markdown, seen)


def table(header: list[Element], rows: list[list[Element]], *, aligned: list[str]) -> Element:
    """A table of simple cells.

    Args:
        header: one cell per column.
        rows: cells by row.
        aligned: `left`, `right`, `center` or `auto` for each column.
    """
    cells = ", ".join(f"[{cell.typst}]" for row in rows for cell in row)
    head = f"table.header({', '.join(f'[{cell.typst}]' for cell in header)}), "
    # With `auto` a cell would take the alignment of the table on the page.
    sides = "".join(f"{'left' if side == 'auto' else side}, " for side in aligned)
    typst = f"#table(columns: {len(aligned)}, align: ({sides}), {head}{cells})"
    marks = {"left": ":--", "right": "--:", "center": ":-:", "auto": "---"}
    lines = [_row(header), f"|{'|'.join(marks[side] for side in aligned)}|", *(_row(row) for row in rows)]
    seen = " ".join(cell.visible for row in [header, *rows] for cell in row)
    return Element(typst, "\n".join(lines), seen)


def _row(cells: list[Element]) -> str:
    texts = (" ".join(cell.markdown.replace("|", "\\|").split()) for cell in cells)
    return f"| {' | '.join(texts)} |"


def stacked(parts: list[Element], *, between: str = "\n\n") -> Element:
    """Blocks one below the other."""
    return Element(
        "\n#parbreak();\n".join(part.typst for part in parts),
        between.join(part.markdown for part in parts),
        " ".join(part.visible for part in parts),
    )
