"""`build_corpus.py notebooks`: charts with their code (paper, section 2: one image, at least five lines of code)."""

from __future__ import annotations

from pathlib import Path

from data_tools.corpus.output import new_folder
from data_tools.corpus.pairs.build import SourceOptions, build_from_sources
from data_tools.corpus.pairs.notebooks.figures import NotebookError, read_notebook, reason_against
from data_tools.corpus.pairs.records import Pair, PairCommand, SourceResult
from data_tools.corpus.pairs.sources import InputFormats, Source
from data_tools.corpus.scripts import script_of
from data_tools.pipeline.extras import require
from megavl.data.image import ImageError, check_image

FORMATS = InputFormats(
    suffixes={".ipynb": "notebook"}, keys={"notebook": "notebook", "content": "notebook", "text": "notebook"}
)
CATEGORY = "conversion/code/chart"
COMMAND = PairCommand(
    name="notebooks",
    unit="notebook",
    category=CATEGORY,
    prompts={
        "latin": (
            "Write the code that draws this chart.",
            "Which code produces this figure?",
            "Recreate this plot in code.",
        ),
        "chinese": ("请写出绘制这张图的代码。", "用代码重现这张图。", "这张图是用什么代码画出来的？"),
    },
    licence="Code and figures carry the rights of their notebooks; see `source` in each record before passing them on.",
    packages=("nbformat",),
    verify="full",
    unique_code=True,
)
MIN_SIDE = 64
"""Pixels of the shorter side; smaller outputs are icons and colour samples."""


def build_notebooks(output: Path, options: SourceOptions) -> dict[str, int]:
    """Write charts and their records; returns the number of records by file.

    Raises:
        UsageError: a package or an input is missing.
        DataError: there is no usable input.
    """
    require("nbformat")

    def make(source: Source, text: str) -> SourceResult:
        return _charts(source, text, fenced=options.records == "llava")

    with new_folder(output, force=options.force) as folder:
        settings = {"figures": "stored"}
        return build_from_sources(COMMAND, options, make, folder=folder, formats=FORMATS, settings=settings)


def _charts(source: Source, text: str, *, fenced: bool) -> SourceResult:
    """The usable figures of one notebook; `fenced` puts their code into a Markdown code block."""
    result = SourceResult()
    drop = result.dropped.add
    try:
        notebook = read_notebook(text)
    except NotebookError as error:
        drop("notebook", source.name, str(error))
        return result
    cells = [cell for cell in notebook.cells if cell.figures]
    if not cells:
        drop("no_figure", source.name, "none is stored; run the notebook and save it")
    for cell in cells:
        where = f"{source.name}, cell {cell.number}"
        reason = reason_against(cell)
        if reason:
            drop(reason, where)
            continue
        image = cell.figures[0]
        try:
            info = check_image(image, verify="header")
        except ImageError as error:
            drop(error.reason, where, str(error))
            continue
        if info.format != "PNG":
            drop("image_format", where, f"a {info.format} where a PNG should be")
        elif min(info.width, info.height) < MIN_SIDE:
            drop("image_small", where, f"{info.width} x {info.height}")
        else:
            code = cell.code.strip("\n")
            answer = f"```{notebook.language}\n{code}\n```" if fenced else code
            extra = {"cell": cell.number, "language": notebook.language}
            result.pairs.append(Pair(source=source.name, image=image, text=answer, script=script_of(code), extra=extra))
    return result
