"""`build_corpus.py scenetext`: pictures with text in them, and that text in reading order."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.corpus.demo.texts import collect_text
from data_tools.corpus.output import new_folder
from data_tools.corpus.pairs.fonts import (
    NO_CHINESE_FONT,
    Face,
    find_faces,
    font_folders,
    is_stand_in,
    writes_chinese,
    writes_latin,
)
from data_tools.corpus.pairs.records import SPLITS, Form, Pair, Prompts, RecordWriter, Split, in_order
from data_tools.corpus.pairs.scenetext.background import crop_background, draw_background
from data_tools.corpus.pairs.scenetext.drawing import disturb, draw_phrases
from data_tools.corpus.pairs.scenetext.phrases import MOST_PHRASES, phrases_of
from data_tools.corpus.pairs.sources import Dropped, Kind, choose_heldout, find_sources, load
from data_tools.corpus.scripts import Script
from megavl.config.errors import DataError, UsageError

KIND = Kind(suffixes={".txt": "text", ".md": "text"}, keys={"text": "text"})

CATEGORY = "recognition/ocr/printed"
PROMPTS: Prompts = {
    "latin": (
        "What text is in this image?",
        "Read all the text in the picture, one piece a line.",
        "Which words can be seen here?",
    ),
    "chinese": ("图中有什么文字？", "请读出图片里的所有文字，每处一行。", "这张图上写了什么？"),
}
LICENCE = (
    "Pictures are made by this program; phrases of a few words are taken from the input, backgrounds from their folder."
)
MOST_ON_ONE = 6
"""Phrases in one picture."""
JPEG_QUALITY = (70, 95)
"""Least and most; photographs come as JPEG, and grain would make PNG files ten times as large."""
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """Settings of the command."""

    inputs: list[Path]
    """Files, folders, JSONL; empty: the documentation of this machine."""
    size: int
    """Bytes of that documentation."""
    debian: Path
    fonts: list[Path]
    backgrounds: Path | None
    """Folder of images; without it backgrounds are drawn."""
    side: int
    """Largest long side of a picture in pixels."""
    samples: int
    """Pictures, held-out ones included."""
    chinese_share: float
    """Of the pictures, where the input has both scripts."""
    form: Form
    heldout: float
    seed: int
    workers: int
    force: bool


Pool = Mapping[tuple[Split, Script], Sequence[str]]
"""Phrases by what they may be used for; none occurs twice."""


def build_scenes(output: Path, options: SceneOptions) -> dict[str, int]:
    """Write pictures and their records; returns records by file.

    Raises:
        UsageError: a folder is missing or empty.
        DataError: no phrases, or Chinese ones and no font for them.
    """
    faces = _faces(options.fonts)
    files = _backgrounds(options)
    dropped = Dropped()
    with new_folder(output, force=options.force) as folder:
        pool = _pool(options, folder=folder, dropped=dropped)
        scripts: list[Script] = [script for script in ("latin", "chinese") if pool["train", script]]
        for script in scripts:
            if not faces[script]:
                raise DataError(f"--input: is partly written in Chinese, and {NO_CHINESE_FONT}")

        def scene(number: int) -> tuple[Split, Pair] | None:
            return draw_scene(number, options, pool=pool, faces=faces, files=files, scripts=scripts)

        writer = RecordWriter(
            folder=folder, seed=options.seed, form=options.form, prompts=PROMPTS, dropped=dropped, category=CATEGORY
        )
        numbers = tqdm(range(options.samples), unit="image", desc="scenes", disable=None)
        with writer:
            for drawn in in_order(scene, numbers, workers=options.workers):
                if drawn is None:
                    dropped.add("no_room", "picture")
                else:
                    writer.add(drawn[1], split=drawn[0])
        settings = {
            "side": options.side,
            "samples": options.samples,
            "heldout": options.heldout,
            "phrases": {f"{split}.{script}": len(found) for (split, script), found in pool.items()},
        }
        return writer.finish(kind="scenetext", options=settings, licence=LICENCE, packages=("numpy", "fonttools"))


def draw_scene(
    number: int,
    options: SceneOptions,
    *,
    pool: Pool,
    faces: Mapping[Script, list[Face]],
    files: Mapping[Split, list[Path]],
    scripts: list[Script],
) -> tuple[Split, Pair] | None:
    """One picture and its record, or None where no phrase found room; follows from the number and the seed alone."""
    rng = random.Random(f"scenetext/{options.seed}/{number}")
    # Error diffusion: of any first n pictures the right number, to within one, is held out.
    split: Split = "heldout" if int((number + 1) * options.heldout) > int(number * options.heldout) else "train"
    script = scripts[0] if len(scripts) == 1 else "chinese" if rng.random() < options.chinese_share else "latin"
    # A script with a single phrase has none to hold out.
    phrases = pool[split, script] or pool[split, next(other for other in scripts if pool[split, other])]
    wide = rng.randint(options.side // 2, options.side)
    size = (wide, min(options.side, max(options.side // 3, round(wide * rng.uniform(0.6, 1.4)))))
    if options.backgrounds:
        path = rng.choice(files[split])
        kind, image = path.relative_to(options.backgrounds).as_posix(), crop_background(rng, size, path=path)
    else:
        kind, image = draw_background(rng, size)
    wanted = [rng.choice(phrases) for _ in range(rng.randint(1, MOST_ON_ONE))]
    placed = draw_phrases(rng, image, list(dict.fromkeys(wanted)), faces=faces[script])
    if not placed:
        return None
    buffer = io.BytesIO()
    disturb(rng, image).save(buffer, "JPEG", quality=rng.randint(*JPEG_QUALITY))
    extra = {"background": kind, "boxes": [{"text": one.text, "quad": one.quad} for one in placed]}
    text = "\n".join(one.text for one in placed)
    return split, Pair(source=f"scene {number}", image=buffer.getvalue(), text=text, script=script, extra=extra)


def _pool(options: SceneOptions, *, folder: Path, dropped: Dropped) -> Pool:
    if options.inputs:
        sources = find_sources(options.inputs, kind=KIND, dropped=dropped)
        texts = ((load(source, kind=KIND), source.script) for source in sources)
    else:
        found = collect_text(size=options.size, seed=options.seed, debian=options.debian)
        latin: Script = "latin"
        texts = ((document.text, latin) for document in found.documents)
    phrases: dict[Script, dict[str, None]] = {"latin": {}, "chinese": {}}
    for text, script in texts:
        for phrase in phrases_of(text, script=script):
            if len(phrases[script]) < MOST_PHRASES:
                phrases[script].setdefault(phrase)
    if not any(phrases.values()):
        raise DataError(f"--input {', '.join(map(str, options.inputs))}: holds no phrase; give texts with words")
    pool: dict[tuple[Split, Script], list[str]] = {(split, script): [] for split in SPLITS for script in phrases}
    for script, known in phrases.items():
        held = choose_heldout(list(known), share=options.heldout, seed=options.seed)
        for phrase in known:
            pool["heldout" if phrase in held else "train", script].append(phrase)
    if options.heldout and not any(pool["heldout", script] for script in phrases):
        raise DataError("--input: has one phrase only, so none can be held out; give more text or --heldout-share 0")
    return pool


def _faces(given: list[Path]) -> dict[Script, list[Face]]:
    folders = font_folders(given)
    faces = [face for face in find_faces(folders) if not is_stand_in(face)]
    latin = [face for face in faces if writes_latin(face)]
    if not latin:
        raise DataError(
            f"{', '.join(map(str, folders))}: no font for English found; install one "
            "(Debian: apt install fonts-dejavu-core) or name its folder with --fonts"
        )
    return {"latin": latin, "chinese": [face for face in faces if writes_chinese(face)]}


def _backgrounds(options: SceneOptions) -> dict[Split, list[Path]]:
    """The files of each split; a single one serves both."""
    folder = options.backgrounds
    if folder is None:
        return {"train": [], "heldout": []}
    if not folder.is_dir():
        raise UsageError(f"--backgrounds {folder}: no such folder; give one with {', '.join(_IMAGES)} files")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _IMAGES and path.is_file()]
    if not files:
        raise UsageError(f"--backgrounds {folder}: holds no {', '.join(_IMAGES)} file")
    names = {path.relative_to(folder).as_posix(): path for path in files}
    held = choose_heldout(list(names), share=options.heldout, seed=options.seed)
    return {
        "train": [path for name, path in names.items() if name not in held],
        "heldout": [path for name, path in names.items() if name in held] or files,
    }
