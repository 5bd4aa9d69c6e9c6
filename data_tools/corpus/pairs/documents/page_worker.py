"""Sets a document with typst and draws its pages with pdfium; run as a program of its own, under limits.

Works in the current folder, which must be empty. Standard input: one JSON request. Standard output: a JSON line with
the pages, then their PNG files one after another.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

MOST_PAGES = 100


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
    """The wanted files, which are all that typst will know besides its own, and the families' names in typst."""
    import typst

    for word, faces in wanted.items():
        os.makedirs(os.path.join("fonts", word))
        for number, path in enumerate(sorted({path for path, _ in faces})):
            os.symlink(path, os.path.join("fonts", word, f"{number}{os.path.splitext(path)[1].lower()}"))
    names = {}
    for word, faces in wanted.items():
        place = os.path.join("fonts", word)
        known = typst.Fonts(include_system_fonts=False, include_embedded_fonts=False, font_paths=[place]).fonts()
        by_face = {(os.path.realpath(str(font.path)), font.index): font.family for font in known}
        path, index = faces[0]
        names[word] = by_face[os.path.realpath(path), index]
    return typst.Fonts(include_system_fonts=False, font_paths=["fonts"]), names


def render(preamble: str, blocks: list[str], empty: list[list[int]], fonts: Any) -> tuple[dict[str, Any], list[bytes]]:
    """Pages with the numbers of their blocks, and the blocks that were refused or do not fit."""
    import typst

    setter = Setter(preamble, blocks, fonts)
    numbers, failed = list(range(len(blocks))), {}
    try:
        pdf, places = setter.set(numbers)
    except typst.TypstError:
        for number in numbers:
            try:
                setter.set([number])
            except typst.TypstError as error:
                failed[number] = str(error)[:300]
        numbers = [number for number in numbers if number not in failed]
        pdf, places = setter.set(numbers)
    if not numbers or max(places.values()) > MOST_PAGES:
        return {"failed": failed, "overflow": [], "pages": []}, []
    drawn = draw(pdf, empty)
    suspects = [number for number in numbers if not drawn[places[number] - 1][1]]
    overflow = [number for number in suspects if not all(clean for _, clean, _ in draw(setter.set([number])[0], empty))]
    if overflow:
        numbers = [number for number in numbers if number not in overflow]
        pdf, places = setter.set(numbers)
        drawn = draw(pdf, empty) if numbers else []
    pages = [
        {
            "blocks": [number for number in numbers if places[number] == page],
            "seen": seen,
            "clean": clean,
            "size": len(data),
        }
        for page, (seen, clean, data) in enumerate(drawn, start=1)
    ]
    return {"failed": failed, "overflow": overflow, "pages": pages}, [data for _, _, data in drawn]


class Setter:
    """Sets any of the blocks of one document."""

    def __init__(self, preamble: str, blocks: list[str], fonts: Any) -> None:
        import typst

        self.preamble, self.blocks = preamble, blocks
        # The document may read nothing but itself, and there is no package to import.
        os.makedirs("root")
        self.source = os.path.join("root", "document.typ")
        self._write([])
        self.compiler = typst.Compiler(
            self.source, root="root", font_paths=fonts, package_path=".", package_cache_path="."
        )

    def set(self, numbers: list[int]) -> tuple[bytes, dict[int, int]]:
        """The PDF, and the page of each block, counted from 1."""
        self._write(numbers)
        pdf = self.compiler.compile(format="pdf", timestamp=0, pdf_tags=False)
        assert isinstance(pdf, bytes)
        return pdf, dict(json.loads(self.compiler.query("<piece>", field="value")))

    def _write(self, numbers: list[int]) -> None:
        pieces = [f"#piece({number})[{self.blocks[number]}]" for number in numbers]
        with open(self.source, "w", encoding="utf-8") as file:
            file.write("\n".join([self.preamble, *pieces, ""]))


def draw(pdf: bytes, empty: list[list[int]]) -> list[tuple[str, bool, bytes]]:
    """Text, whether the empty boxes are, and PNG of each page."""
    import pypdfium2

    drawn = []
    document = pypdfium2.PdfDocument(pdf)
    for page in document:
        image = page.render(scale=1).to_pil().convert("RGB")
        paper = image.getpixel((0, 0))
        clean = all(image.crop(tuple(box)).getcolors(1) == [(area(box), paper)] for box in empty)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=6)
        drawn.append((page.get_textpage().get_text_range(), clean, buffer.getvalue()))
    document.close()
    return drawn


def area(box: list[int]) -> int:
    """Pixels of a box."""
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


if __name__ == "__main__":
    sys.exit(main())
