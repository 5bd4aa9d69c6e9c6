"""`build_corpus.py documents`: page images of documents, each with the text of exactly that page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.corpus.output import new_folder, write_jsonl
from data_tools.corpus.pairs.build import SourceOptions, TextOptions, build_from_sources
from data_tools.corpus.pairs.documents.pages import make_pages
from data_tools.corpus.pairs.documents.reading import pandoc
from data_tools.corpus.pairs.fonts import font_folders, load_fonts
from data_tools.corpus.pairs.records import PairCommand, SourceResult
from data_tools.corpus.pairs.sources import InputFormats, Source
from data_tools.corpus.texts import collect_text
from data_tools.pipeline.extras import require

FORMATS = InputFormats(
    suffixes={
        ".md": "markdown",
        ".markdown": "markdown",
        ".html": "html",
        ".htm": "html",
        ".tex": "latex",
        ".txt": "text",
    },
    keys={"markdown": "markdown", "html": "html", "latex": "latex", "text": "text"},
)
CATEGORY = "recognition/ocr/format"
COMMAND = PairCommand(
    name="documents",
    unit="document",
    category=CATEGORY,
    prompts={
        "latin": (
            "Transcribe this page.",
            "Write down the text of this page in Markdown.",
            "What does this page say? Answer with its full text.",
            "Convert the page to Markdown.",
        ),
        "chinese": (
            "请转录这一页的内容。",
            "用 Markdown 写出这一页的文字。",
            "这一页写了什么？请给出全文。",
            "把这一页转换成 Markdown。",
        ),
    },
    licence="Pages and texts carry the rights of their sources; see `source` in each record before passing them on.",
    packages=("typst", "pypdfium2", "pypandoc_binary", "fonttools"),
)


@dataclass(frozen=True, kw_only=True)
class DocumentOptions(SourceOptions, TextOptions):
    """Options of the command."""


def build_documents(output: Path, options: DocumentOptions) -> dict[str, int]:
    """Write page images and their records; returns the number of records by file.

    Raises:
        UsageError: a program or an input is missing.
        DataError: there is no usable input, or Chinese text and no font for it.
    """
    require("typst", "pypdfium2", "pypandoc", "fontTools")
    pandoc()
    fonts = load_fonts(font_folders(options.fonts))

    def make(source: Source, text: str) -> SourceResult:
        return make_pages(
            text,
            name=source.name,
            format=source.format,
            script=source.script,
            seed=f"documents/{options.seed}/{source.key}",
            fonts=fonts,
            side=options.side,
        )

    with new_folder(output, force=options.force) as folder:
        collected = folder / "documentation.jsonl"
        if not options.input:
            found = collect_text(size=options.size, seed=options.seed, debian=options.debian_root).documents
            write_jsonl(collected, ({"source": document.source, "text": document.text} for document in found))
            options = replace(options, input=[collected])
        counts = build_from_sources(
            COMMAND,
            options,
            make,
            folder=folder,
            formats=FORMATS,
            settings={"side": options.side},
            has_chinese_font=bool(fonts.chinese),
        )
        collected.unlink(missing_ok=True)
    return counts
