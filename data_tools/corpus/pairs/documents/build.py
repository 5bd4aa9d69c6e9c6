"""`build_corpus.py documents`: page images of documents, each with the text of exactly that page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.corpus.demo.texts import collect_text
from data_tools.corpus.output import new_folder, write_jsonl
from data_tools.corpus.pairs.documents.pages import Page, make_pages
from data_tools.corpus.pairs.documents.reading import pandoc
from data_tools.corpus.pairs.fonts import NO_CHINESE_FONT, font_folders, open_book
from data_tools.corpus.pairs.records import Form, Pair, Prompts, RecordWriter, in_order
from data_tools.corpus.pairs.sources import Dropped, Kind, Source, find_sources, heldout_sources, load
from data_tools.pipeline.extras import require
from megavl.config.errors import DataError

KIND = Kind(
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
PROMPTS: Prompts = {
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
}

LICENCE = "Pages and texts carry the rights of their sources; see `source` in each record before passing them on."
PACKAGES = ("typst", "pypdfium2", "pypandoc_binary", "fonttools")


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Settings of the command."""

    inputs: list[Path]
    """Files, folders, JSONL; empty: the documentation of this machine."""
    size: int
    """Bytes of that documentation."""
    debian: Path
    fonts: list[Path]
    side: int
    """Long side of a page in pixels."""
    limit: int | None
    """Documents."""
    form: Form
    heldout: float
    seed: int
    workers: int
    force: bool


def build_documents(output: Path, options: DocumentOptions) -> dict[str, int]:
    """Write page images and their records; returns records by file.

    Raises:
        UsageError: a program or an input is missing.
        DataError: nothing usable, or Chinese text and no font for it.
    """
    require("typst", "pypdfium2", "pypandoc", "fontTools")
    pandoc()
    book = open_book(font_folders(options.fonts))
    dropped = Dropped()
    with new_folder(output, force=options.force) as folder:
        inputs = options.inputs or [_documentation(folder / "documentation.jsonl", options)]
        sources = find_sources(inputs, kind=KIND, dropped=dropped, limit=options.limit)
        chinese = next((source for source in sources if source.script == "chinese"), None)
        if chinese is not None and not book.chinese:
            raise DataError(f"{chinese.name}: is written in Chinese, and {NO_CHINESE_FONT}")
        held = heldout_sources(sources, share=options.heldout, seed=options.seed)

        def pages_of(source: Source) -> tuple[list[Page], Dropped]:
            return make_pages(
                load(source, kind=KIND),
                name=source.name,
                format=source.format,
                script=source.script,
                seed=f"documents/{options.seed}/{source.key}",
                book=book,
                side=options.side,
            )

        writer = RecordWriter(
            folder=folder, seed=options.seed, form=options.form, prompts=PROMPTS, dropped=dropped, category=CATEGORY
        )
        results = in_order(pages_of, sources, workers=options.workers)
        with writer, tqdm(total=len(sources), unit="document", desc="documents", disable=None) as progress:
            for source, (pages, lost) in zip(sources, results, strict=True):
                dropped.merge(lost)
                for page in pages:
                    extra = {"page": page.number, "format": source.format, **page.layout.notes}
                    pair = Pair(source=source.name, image=page.image, text=page.text, script=source.script, extra=extra)
                    writer.add(pair, split="heldout" if source.key in held else "train")
                progress.set_postfix(pages=writer.counts["train.jsonl"] + writer.counts["heldout.jsonl"])
                progress.update()
        (folder / "documentation.jsonl").unlink(missing_ok=True)
        settings = {"side": options.side, "heldout": options.heldout, "documents": len(sources)}
        return writer.finish(kind="documents", options=settings, licence=LICENCE, packages=PACKAGES)


def _documentation(path: Path, options: DocumentOptions) -> Path:
    """The machine's documentation as an input file."""
    collection = collect_text(size=options.size, seed=options.seed, debian=options.debian)
    write_jsonl(path, ({"source": document.source, "text": document.text} for document in collection.documents))
    return path
