"""Typesets a document with typst and renders its pages with pdfium; runs as a separate program with limits.

It works in the current folder, which must be empty. Standard input is one JSON request. Standard output is a JSON line
that describes the pages, then their PNG files one after another.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

MAX_PAGES = 100


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    fonts, names = open_fonts(request["fonts"])
    preamble = request["preamble"]
    for word, name in names.items():
        preamble = preamble.replace(word, json.dumps(name, ensure_ascii=False))
    answer, files = render(preamble, request["blocks"], request["empty"], fonts)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    for data in files:
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return 0


def open_fonts(wanted: dict[str, list[list[Any]]]) -> tuple[Any, dict[str, str]]:
    """The fonts that typst may use besides its own, and the name of each family in typst."""
    import typst

    for word, faces in wanted.items():
        os.makedirs(os.path.join("fonts", word))
        for number, path in enumerate(sorted({path for path, _ in faces})):
            os.symlink(path, os.path.join("fonts", word, f"{number}{os.path.splitext(path)[1].lower()}"))
    names = {}
    for word, faces in wanted.items():
        folder = os.path.join("fonts", word)
        known = typst.Fonts(include_system_fonts=False, include_embedded_fonts=False, font_paths=[folder]).fonts()
        by_face = {(os.path.realpath(str(font.path)), font.index): font.family for font in known}
        path, index = faces[0]
        names[word] = by_face[os.path.realpath(path), index]
    return typst.Fonts(include_system_fonts=False, font_paths=["fonts"]), names


def render(preamble: str, blocks: list[str], empty: list[list[int]], fonts: Any) -> tuple[dict[str, Any], list[bytes]]:
    """The pages with the numbers of their blocks; and the blocks that typst refuses or that do not fit."""
    import typst

    typesetter = Typesetter(preamble, blocks, fonts)
    numbers, failed = list(range(len(blocks))), {}
    try:
        pdf, page_of = typesetter.typeset(numbers)
    except typst.TypstError:
        for number in numbers:
            try:
                typesetter.typeset([number])
            except typst.TypstError as error:
                failed[number] = str(error)[:300]
        numbers = [number for number in numbers if number not in failed]
        pdf, page_of = typesetter.typeset(numbers)
    if not numbers or max(page_of.values()) > MAX_PAGES:
        return {"failed": failed, "overflow": [], "pages": []}, []
    rendered = render_pages(pdf, empty)
    unclean = [number for number in numbers if not rendered[page_of[number] - 1][1]]
    overflow = [
        number
        for number in unclean
        if not all(clean for _, clean, _ in render_pages(typesetter.typeset([number])[0], empty))
    ]
    if overflow:
        numbers = [number for number in numbers if number not in overflow]
        pdf, page_of = typesetter.typeset(numbers)
        rendered = render_pages(pdf, empty) if numbers else []
    pages = [
        {
            "blocks": [number for number in numbers if page_of[number] == page],
            "visible": visible,
            "clean": clean,
            "size": len(data),
        }
        for page, (visible, clean, data) in enumerate(rendered, start=1)
    ]
    return {"failed": failed, "overflow": overflow, "pages": pages}, [data for _, _, data in rendered]


class Typesetter:
    """Typesets any of the blocks of one document."""

    def __init__(self, preamble: str, blocks: list[str], fonts: Any) -> None:
        import typst

        self.preamble, self.blocks = preamble, blocks
        # The root holds only the document, so it can read no other file; there is no package to import.
        os.makedirs("root")
        self.source = os.path.join("root", "document.typ")
        self._write([])
        self.compiler = typst.Compiler(
            self.source, root="root", font_paths=fonts, package_path=".", package_cache_path="."
        )

    def typeset(self, numbers: list[int]) -> tuple[bytes, dict[int, int]]:
        """The PDF, and the page of each block, counted from 1."""
        self._write(numbers)
        pdf = self.compiler.compile(format="pdf", timestamp=0, pdf_tags=False)
        assert isinstance(pdf, bytes)
        return pdf, dict(json.loads(self.compiler.query("<piece>", field="value")))

    def _write(self, numbers: list[int]) -> None:
        pieces = [f"#piece({number})[{self.blocks[number]}]" for number in numbers]
        with open(self.source, "w", encoding="utf-8") as file:
            file.write("\n".join([self.preamble, *pieces, ""]))


def render_pages(pdf: bytes, empty: list[list[int]]) -> list[tuple[str, bool, bytes]]:
    """For each page its text layer, whether the boxes are empty, and its PNG file."""
    import pypdfium2

    rendered = []
    document = pypdfium2.PdfDocument(pdf)
    for page in document:
        image = page.render(scale=1).to_pil().convert("RGB")
        paper = image.getpixel((0, 0))
        clean = all(image.crop(tuple(box)).getcolors(1) == [(area(box), paper)] for box in empty)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=6)
        rendered.append((page.get_textpage().get_text_range(), clean, buffer.getvalue()))
    document.close()
    return rendered


def area(box: list[int]) -> int:
    """Number of pixels in a box."""
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


if __name__ == "__main__":
    sys.exit(main())
