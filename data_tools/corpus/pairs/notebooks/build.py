"""`build_corpus.py notebooks`: charts with their code (paper, section 2: one image, five lines of code or more)."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_tools.corpus.output import new_folder
from data_tools.corpus.pairs.notebooks.drawing import Studio, open_studio
from data_tools.corpus.pairs.notebooks.figures import Notebook, NotebookError, read_notebook, reason_against
from data_tools.corpus.pairs.records import Form, Pair, Prompts, RecordWriter, in_order
from data_tools.corpus.pairs.sources import Dropped, Kind, Source, find_sources, heldout_sources, load
from data_tools.corpus.scripts import script_of
from data_tools.pipeline.extras import require
from megavl.data.image import ImageError, check_image

KIND = Kind(suffixes={".ipynb": "notebook"}, keys={"notebook": "notebook", "content": "notebook", "text": "notebook"})

CATEGORY = "conversion/code/chart"
PROMPTS: Prompts = {
    "latin": (
        "Write the code that draws this chart.",
        "Which code produces this figure?",
        "Recreate this plot in code.",
    ),
    "chinese": ("请写出绘制这张图的代码。", "用代码重现这张图。", "这张图是用什么代码画出来的？"),
}
LICENCE = "Code and figures carry the rights of their notebooks; see `source` in each record before passing them on."
SMALLEST = 64
"""Pixels of the shorter side; smaller outputs are icons and swatches."""


@dataclass(frozen=True, kw_only=True)
class NotebookOptions:
    """Settings of the command."""

    inputs: list[Path]
    limit: int | None
    """Notebooks."""
    render: bool
    """Draw the figures again instead of taking the stored ones."""
    weak: bool
    """Accept a sandbox that only limits."""
    dpi: int
    """Of figures drawn again."""
    form: Form
    heldout: float
    seed: int
    workers: int
    force: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one notebook gives."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: Dropped = field(default_factory=Dropped)


def build_notebooks(output: Path, options: NotebookOptions) -> dict[str, int]:
    """Write charts and their records; returns records by file.

    Raises:
        UsageError: a package, an input or the sandbox is missing.
        DataError: nothing usable.
    """
    require("nbformat", *(["matplotlib", "fontTools"] if options.render else []))
    dropped = Dropped()
    place = open_studio(isolated=not options.weak, dpi=options.dpi) if options.render else nullcontext(None)
    with place as studio, new_folder(output, force=options.force) as folder:
        sources = find_sources(options.inputs, kind=KIND, dropped=dropped, limit=options.limit)
        held = heldout_sources(sources, share=options.heldout, seed=options.seed)
        seen: set[str] = set()
        writer = RecordWriter(
            folder=folder,
            seed=options.seed,
            form=options.form,
            prompts=PROMPTS,
            dropped=dropped,
            category=CATEGORY,
            verify="full",
        )
        results = in_order(lambda source: take(source, options, studio=studio), sources, workers=options.workers)
        with writer, tqdm(total=len(sources), unit="notebook", desc="notebooks", disable=None) as progress:
            for source, found in zip(sources, results, strict=True):
                dropped.merge(found.dropped)
                for pair in found.pairs:
                    key = hashlib.sha256(" ".join(pair.text.split()).encode()).hexdigest()
                    if key in seen:
                        dropped.add("same_code", pair.source)
                    elif writer.add(pair, split="heldout" if source.key in held else "train"):
                        seen.add(key)
                progress.update()
        settings = {"heldout": options.heldout, "notebooks": len(sources), "figures": "stored"}
        if options.render:
            settings |= {"figures": "drawn again", "dpi": options.dpi, "isolated": not options.weak}
        packages = ("nbformat", *(("matplotlib", "numpy", "fonttools") if options.render else ()))
        return writer.finish(kind="notebooks", options=settings, licence=LICENCE, packages=packages)


def take(source: Source, options: NotebookOptions, *, studio: Studio | None) -> Found:
    """The usable figures of one notebook."""
    found = Found()
    try:
        notebook = read_notebook(load(source, kind=KIND))
    except NotebookError as error:
        found.dropped.add("notebook", source.name, str(error))
        return found
    if studio is not None and notebook.language != "python":
        found.dropped.add("language", source.name, notebook.language)
        return found
    figures = _figures(notebook, source, studio=studio, dropped=found.dropped)
    if not any(figures.values()) and not found.dropped.counts:
        found.dropped.add("no_figure", source.name, "" if studio else "none is stored; --render draws them")
    for cell in notebook.cells:
        where = f"{source.name}, cell {cell.number}"
        images = figures.get(cell.number, [])
        if not images:
            continue
        reason = reason_against(cell, figures=len(images))
        if reason:
            found.dropped.add(reason, where)
            continue
        try:
            info = check_image(images[0], verify="header")
        except ImageError as error:
            found.dropped.add(error.reason, where, str(error))
            continue
        if info.format != "PNG":
            found.dropped.add("image_format", where, f"a {info.format} where a PNG should be")
        elif min(info.width, info.height) < SMALLEST:
            found.dropped.add("image_small", where, f"{info.width} x {info.height}")
        else:
            code = cell.code.strip("\n")
            text = f"```{notebook.language}\n{code}\n```" if options.form == "llava" else code
            extra = {"cell": cell.number, "language": notebook.language}
            pair = Pair(source=source.name, image=images[0], text=text, script=script_of(code), extra=extra)
            found.pairs.append(pair)
    return found


def _figures(notebook: Notebook, source: Source, *, studio: Studio | None, dropped: Dropped) -> dict[int, list[bytes]]:
    if studio is None:
        return {cell.number: list(cell.figures) for cell in notebook.cells}
    figures, errors = studio.draw(notebook)
    for reason, detail in errors.items():
        dropped.add(reason, source.name, detail)
    return figures
