"""Command line of the pair commands: documents, notebooks, screens, scenetext."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from data_tools.corpus.options import share, whole
from data_tools.corpus.pairs.build import SourceOptions
from data_tools.corpus.pairs.documents.build import DocumentOptions, build_documents
from data_tools.corpus.pairs.notebooks.build import build_notebooks
from data_tools.corpus.pairs.scenetext.build import SceneOptions, build_scenes
from data_tools.corpus.pairs.screens.build import ScreenOptions, build_screens

MAX_COUNT = 100_000_000
"""Largest number of sources or images."""
SIDES = (256, 4096)
"""Minimum and maximum of an image's long side in pixels."""


class _RemovedRender(argparse.Action):
    """Answers `--render`, which earlier versions had, with what happens instead."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error("--render was removed in 0.2; the figures stored in the notebooks are used")


def _run(options_class: type[Any], build: Callable[[Path, Any], dict[str, int]], **options: Any) -> dict[str, int]:
    """Run a builder on the options of the command line, which are named like the fields of its options class."""
    return build(options.pop("output"), options_class(**options))


def add_pair_commands(commands: Any, *, common: argparse.ArgumentParser, texts: argparse.ArgumentParser) -> None:
    """Add the four commands.

    Args:
        commands: the result of `add_subparsers`.
        common: options of every command.
        texts: options of the documentation of this machine.
    """
    pairs = argparse.ArgumentParser(add_help=False)
    add = pairs.add_argument
    add("--records", choices=("caption", "llava"), default="caption", help="record format for preprocess.py (caption)")
    add("--heldout-share", type=share(0.5), default=0.05, help="share of the sources that are held out (0.05)")
    cores = len(os.sched_getaffinity(0))
    workers = f"sources processed at the same time; the output does not depend on it ({cores})"
    add("--workers", type=whole(1, 1024), default=cores, help=workers)

    limited = argparse.ArgumentParser(add_help=False)
    limited.add_argument("--limit", type=whole(1, MAX_COUNT), help="number of sources to read (all)")

    fonts = argparse.ArgumentParser(add_help=False)
    fonts.add_argument("--fonts", type=Path, nargs="+", default=[], help="folders of fonts (those of the system)")

    def command(name: str, run: Callable[..., Any], *parents: argparse.ArgumentParser, about: str, source: str) -> Any:
        made = commands.add_parser(name, parents=[common, pairs, *parents], help=about)
        made.set_defaults(build=run)
        optional = texts in parents
        about_input = f"{source}, folders of them, or JSONL" + (" (documentation of this machine)" if optional else "")
        made.add_argument("--input", type=Path, nargs="+", default=[], required=not optional, help=about_input)
        return made

    run = partial(_run, DocumentOptions, build_documents)
    formats = ".md, .html, .tex, .txt"
    documents = command("documents", run, texts, limited, fonts, about="page images with their text", source=formats)
    documents.add_argument("--side", type=whole(*SIDES), default=1024, help="long side of a page in pixels (1024)")

    run = partial(_run, SourceOptions, build_notebooks)
    notebooks = command("notebooks", run, limited, about="charts with their code", source=".ipynb")
    notebooks.add_argument(
        "--render", action=_RemovedRender, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )

    run = partial(_run, ScreenOptions, build_screens)
    screens = command("screens", run, limited, about="screenshots with their HTML", source=".html")
    screens.add_argument("--browser", type=Path, help="path of Chromium (the installed one)")

    run = partial(_run, SceneOptions, build_scenes)
    scenes = command("scenetext", run, texts, fonts, about="images with rendered text", source=".txt, .md")
    scenes.add_argument("--samples", type=whole(1, MAX_COUNT), default=1000, help="number of images (1000)")
    scenes.add_argument("--side", type=whole(*SIDES), default=768, help="largest long side in pixels (768)")
    scenes.add_argument("--chinese-share", type=share(1.0), default=0.5, help="Chinese images, if both exist (0.5)")
    scenes.add_argument("--backgrounds", type=Path, help="folder of background images (drawn surfaces)")
