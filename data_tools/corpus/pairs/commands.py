"""The commands of `build_corpus.py` that make pairs of image and text: documents, notebooks, screens, scenetext."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.corpus.number_option import share, whole
from data_tools.corpus.pairs.documents.build import DocumentOptions, build_documents
from data_tools.corpus.pairs.notebooks.build import NotebookOptions, build_notebooks
from data_tools.corpus.pairs.scenetext.build import SceneOptions, build_scenes
from data_tools.corpus.pairs.screens.build import ScreenOptions, build_screens

LARGEST = 100_000_000
"""Most sources or pictures."""
SIDES = (256, 4096)
"""Pixels of a picture's long side, least and most."""


def add_pair_commands(commands: Any, *, common: argparse.ArgumentParser, texts: argparse.ArgumentParser) -> None:
    """Add the four commands.

    Args:
        commands: what `add_subparsers` returned.
        common: options of every command.
        texts: options of the machine's own text.
    """
    pairs = argparse.ArgumentParser(add_help=False)
    add = pairs.add_argument
    add("--records", choices=("caption", "llava"), default="caption", help="format for preprocess.py (caption)")
    add("--heldout-share", type=share(0.5), default=0.05, help="of the sources, kept from train.jsonl (0.05)")
    cores = len(os.sched_getaffinity(0))
    add(
        "--workers",
        type=whole(1, 1024),
        default=cores,
        help=f"at work at once; the bytes do not depend on it ({cores})",
    )

    limited = argparse.ArgumentParser(add_help=False)
    limited.add_argument("--limit", type=whole(1, LARGEST), help="sources to read (all)")

    fonts = argparse.ArgumentParser(add_help=False)
    fonts.add_argument("--fonts", type=Path, nargs="+", default=[], help="folders of fonts (the system's)")

    def command(name: str, *parents: argparse.ArgumentParser, about: str, source: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, parents=[common, pairs, *parents], help=about)
        ours = texts in parents
        made.add_argument(
            "--input",
            type=Path,
            nargs="+",
            default=[],
            required=not ours,
            help=f"{source}, folders of them, or JSONL" + (" (this machine's documentation)" if ours else ""),
        )
        return made

    documents = command(
        "documents", texts, limited, fonts, about="pages with their text", source=".md, .html, .tex, .txt"
    )
    documents.add_argument("--side", type=whole(*SIDES), default=1024, help="long side of a page in pixels (1024)")

    notebooks = command("notebooks", limited, about="charts with their code", source=".ipynb")
    notebooks.add_argument("--render", action="store_true", help="run the code in a sandbox and take its figures")
    notebooks.add_argument("--weak-sandbox", action="store_true", help="run it with your rights, only time-limited")
    notebooks.add_argument("--dpi", type=whole(20, 400), default=100, help="of figures drawn by --render (100)")

    screens = command("screens", limited, about="screenshots with their HTML", source=".html")
    screens.add_argument("--browser", type=Path, help="program of Chromium (the one installed)")

    scenes = command("scenetext", texts, fonts, about="text on backgrounds", source=".txt, .md")
    scenes.add_argument("--samples", type=whole(1, LARGEST), default=1000, help="pictures (1000)")
    scenes.add_argument("--side", type=whole(*SIDES), default=768, help="largest long side in pixels (768)")
    scenes.add_argument("--chinese-share", type=share(1.0), default=0.5, help="of the pictures, given both (0.5)")
    scenes.add_argument("--backgrounds", type=Path, help="folder of images (drawn surfaces)")


def run_pairs(options: argparse.Namespace) -> dict[str, int]:
    """Run one of the four commands; returns records by file."""
    return PAIR_COMMANDS[options.command](options)


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "inputs": options.input,
        "form": options.records,
        "heldout": options.heldout_share,
        "seed": options.seed,
        "workers": options.workers,
        "force": options.force,
    }


def _documents(options: argparse.Namespace) -> dict[str, int]:
    return build_documents(
        options.output,
        DocumentOptions(
            **_shared(options),
            size=options.size,
            debian=options.debian_root,
            fonts=options.fonts,
            side=options.side,
            limit=options.limit,
        ),
    )


def _notebooks(options: argparse.Namespace) -> dict[str, int]:
    return build_notebooks(
        options.output,
        NotebookOptions(
            **_shared(options),
            limit=options.limit,
            render=options.render,
            weak=options.weak_sandbox,
            dpi=options.dpi,
        ),
    )


def _screens(options: argparse.Namespace) -> dict[str, int]:
    return build_screens(
        options.output, ScreenOptions(**_shared(options), limit=options.limit, browser=options.browser)
    )


def _scenetext(options: argparse.Namespace) -> dict[str, int]:
    return build_scenes(
        options.output,
        SceneOptions(
            **_shared(options),
            size=options.size,
            debian=options.debian_root,
            fonts=options.fonts,
            side=options.side,
            samples=options.samples,
            chinese_share=options.chinese_share,
            backgrounds=options.backgrounds,
        ),
    )


PAIR_COMMANDS: dict[str, Callable[[argparse.Namespace], dict[str, int]]] = {
    "documents": _documents,
    "notebooks": _notebooks,
    "screens": _screens,
    "scenetext": _scenetext,
}
