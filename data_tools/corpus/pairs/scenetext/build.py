"""`build_corpus.py scenetext`: scenes with text in them, and that text in reading order."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_tools.corpus.output import new_folder
from data_tools.corpus.pairs.build import TextOptions
from data_tools.corpus.pairs.fonts import (
    NO_CHINESE_FONT,
    Face,
    find_faces,
    font_folders,
    no_font,
    supports_chinese,
    supports_latin,
)
from data_tools.corpus.pairs.records import SPLITS, Pair, PairCommand, RecordWriter, SourceResult, Split
from data_tools.corpus.pairs.scenetext.background import crop_background, draw_background
from data_tools.corpus.pairs.scenetext.drawing import degrade, draw_phrases
from data_tools.corpus.pairs.scenetext.phrases import MAX_PHRASES, phrases_of
from data_tools.corpus.pairs.sources import Dropped, InputFormats, choose_heldout, find_sources, load
from data_tools.corpus.scripts import Script
from data_tools.corpus.texts import collect_text
from data_tools.readers.tar_archive import IMAGE_SUFFIXES
from megavl.config.errors import DataError, UsageError

FORMATS = InputFormats(suffixes={".txt": "text", ".md": "text"}, keys={"text": "text"})
CATEGORY = "recognition/ocr/printed"
COMMAND = PairCommand(
    name="scenetext",
    unit="image",
    category=CATEGORY,
    prompts={
        "latin": (
            "What text is in this image?",
            "Read all the text in the picture, one piece a line.",
            "Which words can be seen here?",
        ),
        "chinese": ("图中有什么文字？", "请读出图片里的所有文字，每处一行。", "这张图上写了什么？"),
    },
    licence="Pictures are made by this program; phrases of a few words are taken from the input, backgrounds from "
    "their folder.",
    packages=("numpy", "fonttools"),
)
MAX_PHRASES_PER_IMAGE = 6
JPEG_QUALITY = (70, 95)
"""Minimum and maximum. Photographs come as JPEG, and noise would make PNG files ten times as large."""
_IMAGE_SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class SceneOptions(TextOptions):
    """Options of the command."""

    backgrounds: Path | None
    """Folder of images; None draws backgrounds."""
    samples: int
    """Number of images in both splits together."""
    chinese_share: float
    """Share of the images with Chinese text, if the input has both scripts."""


Phrases = Mapping[tuple[Split, Script], Sequence[str]]
"""Distinct phrases by split and script."""


def build_scenes(output: Path, options: SceneOptions) -> dict[str, int]:
    """Write images and their records; returns the number of records by file.

    Raises:
        UsageError: a folder is missing or empty.
        DataError: there are no phrases, or Chinese ones and no font for them.
    """
    faces = _faces(options.fonts)
    backgrounds = _backgrounds(options)
    dropped = Dropped()
    with new_folder(output, force=options.force) as folder:
        phrases = _phrases(options, dropped=dropped)
        scripts: list[Script] = [script for script in ("latin", "chinese") if phrases["train", script]]
        if "chinese" in scripts and not faces["chinese"]:
            raise DataError(f"--input: is partly written in Chinese, and {NO_CHINESE_FONT}")

        make = partial(
            draw_scene, options=options, phrases=phrases, faces=faces, backgrounds=backgrounds, scripts=scripts
        )
        writer = RecordWriter(folder=folder, command=COMMAND, options=options, dropped=dropped)
        share = options.heldout_share
        writer.write_all(range(options.samples), make, split_of=lambda number: _split_of(number, share=share))
        return writer.finish(
            {
                "side": options.side,
                "samples": options.samples,
                "heldout": share,
                "phrases": {f"{split}.{script}": len(found) for (split, script), found in phrases.items()},
            }
        )


def _split_of(number: int, *, share: float) -> Split:
    """Split of an image; the held-out share of any first n images is exact to within one."""
    return "heldout" if int((number + 1) * share) > int(number * share) else "train"


def draw_scene(
    number: int,
    *,
    options: SceneOptions,
    phrases: Phrases,
    faces: Mapping[Script, list[Face]],
    backgrounds: Mapping[Split, list[Path]],
    scripts: list[Script],
) -> SourceResult:
    """Draw one image, which depends on its number and the seed alone; nothing if no phrase fits into it."""
    result = SourceResult()
    rng = random.Random(f"scenetext/{options.seed}/{number}")
    split = _split_of(number, share=options.heldout_share)
    script = scripts[0] if len(scripts) == 1 else "chinese" if rng.random() < options.chinese_share else "latin"
    # A script with a single phrase has none to hold out.
    usable = phrases[split, script] or phrases[split, next(other for other in scripts if phrases[split, other])]
    width = rng.randint(options.side // 2, options.side)
    size = (width, min(options.side, max(options.side // 3, round(width * rng.uniform(0.6, 1.4)))))
    if options.backgrounds:
        path = rng.choice(backgrounds[split])
        background, image = path.relative_to(options.backgrounds).as_posix(), crop_background(rng, size, path=path)
    else:
        background, image = draw_background(rng, size)
    wanted = [rng.choice(usable) for _ in range(rng.randint(1, MAX_PHRASES_PER_IMAGE))]
    drawn = draw_phrases(rng, image, list(dict.fromkeys(wanted)), faces=faces[script])
    if not drawn:
        result.dropped.add("no_room", "picture")
        return result
    buffer = io.BytesIO()
    degrade(rng, image).save(buffer, "JPEG", quality=rng.randint(*JPEG_QUALITY))
    extra = {"background_id": background, "boxes": [{"text": one.text, "quad": one.quad} for one in drawn]}
    text = "\n".join(one.text for one in drawn)
    result.pairs.append(Pair(source=f"scene {number}", image=buffer.getvalue(), text=text, script=script, extra=extra))
    return result


def _phrases(options: SceneOptions, *, dropped: Dropped) -> Phrases:
    """Phrases of the input, or of the documentation of this machine."""
    latin: Script = "latin"
    if options.input:
        sources = find_sources(options.input, formats=FORMATS, dropped=dropped)
        texts = ((load(source, formats=FORMATS), source.script) for source in sources)
    else:
        collection = collect_text(size=options.size, seed=options.seed, debian=options.debian_root)
        texts = ((document.text, latin) for document in collection.documents)
    found: dict[Script, dict[str, None]] = {"latin": {}, "chinese": {}}
    for text, script in texts:
        for phrase in phrases_of(text, script=script):
            if len(found[script]) < MAX_PHRASES:
                found[script].setdefault(phrase)
    if not any(found.values()):
        raise DataError(f"--input {', '.join(map(str, options.input))}: holds no phrase; give texts with words")
    phrases: dict[tuple[Split, Script], list[str]] = {(split, script): [] for split in SPLITS for script in found}
    for script, known in found.items():
        held = choose_heldout(list(known), share=options.heldout_share, seed=options.seed)
        for phrase in known:
            phrases["heldout" if phrase in held else "train", script].append(phrase)
    if options.heldout_share and not any(phrases["heldout", script] for script in found):
        raise DataError("--input: has one phrase only, so none can be held out; give more text or --heldout-share 0")
    return phrases


def _faces(given: list[Path]) -> dict[Script, list[Face]]:
    """Usable faces by script."""
    folders = font_folders(given)
    faces = [face for face in find_faces(folders) if not face.is_placeholder]
    latin = [face for face in faces if supports_latin(face)]
    if not latin:
        raise no_font(folders, missing="font for English")
    return {"latin": latin, "chinese": [face for face in faces if supports_chinese(face)]}


def _backgrounds(options: SceneOptions) -> dict[Split, list[Path]]:
    """Background files of each split; a single file is used for both."""
    folder = options.backgrounds
    if folder is None:
        return {"train": [], "heldout": []}
    if not folder.is_dir():
        raise UsageError(f"--backgrounds {folder}: no such folder; give one with {', '.join(_IMAGE_SUFFIXES)} files")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()]
    if not files:
        raise UsageError(f"--backgrounds {folder}: holds no {', '.join(_IMAGE_SUFFIXES)} file")
    names = {path.relative_to(folder).as_posix(): path for path in files}
    held = choose_heldout(list(names), share=options.heldout_share, seed=options.seed)
    return {
        "train": [path for name, path in names.items() if name not in held],
        "heldout": [path for name, path in names.items() if name in held] or files,
    }
