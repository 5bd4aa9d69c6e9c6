"""Fonts on this machine: families that write English or Chinese, and exactly which characters each of them has.

A renderer draws an empty box for a character that its font lacks, so nothing is rendered before it was looked up here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from data_tools.pipeline.extras import require
from megavl.config.errors import DataError, UsageError

SYSTEM_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")

REGULAR, BOLD = 400, 700
NORMAL_WIDTH = 5
"""usWeightClass and usWidthClass of the OpenType specification, table OS/2."""

PLACEHOLDER_FONT = 100_000
"""Characters from which on a font only draws stand-ins, as Last Resort does."""
MOST_HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过"
"""Frequent Chinese characters; a font without one of them writes another language."""

_ASCII = frozenset(range(0x20, 0x7F))
_LATIN = _ASCII | set(range(0xC0, 0x100)) - {0xD7, 0xF7}
_NAMED_OTHERWISE = (" JP", " KR", " TC", " HK", " TW")

NO_CHINESE_FONT = (
    "no font here has the Chinese characters; install one (Debian: apt install fonts-wqy-microhei or fonts-noto-cjk)"
)


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face of one font file."""

    path: str
    index: int
    """Place inside a collection; 0 in other files."""
    family: str
    weight: int
    width: int
    italic: bool
    monospaced: bool

    @property
    def characters(self) -> frozenset[int]:
        """Code points with a glyph."""
        return _characters(self.path, self.index)

    def covers(self, text: str) -> bool:
        """Whether every visible character of a text has a glyph."""
        return visible(text) <= self.characters


@dataclass(frozen=True)
class Family:
    """Faces of one name: regular, and bold and italic where there are any."""

    name: str
    faces: tuple[Face, ...]
    """The regular face first."""

    @property
    def regular(self) -> Face:
        """The upright face of normal weight."""
        return self.faces[0]

    @cached_property
    def characters(self) -> frozenset[int]:
        """Code points that every face has."""
        return frozenset.intersection(*(face.characters for face in self.faces))


@dataclass(frozen=True, kw_only=True)
class FontBook:
    """Usable families by what they are for, each list sorted by name."""

    text: tuple[Family, ...]
    mono: tuple[Family, ...]
    chinese: tuple[Family, ...]


def visible(text: str) -> frozenset[int]:
    """Code points of a text that need a glyph."""
    return frozenset(ord(character) for character in text if not character.isspace())


def font_folders(given: list[Path]) -> list[Path]:
    """The folders given, or the system's and those of the fonts that matplotlib brings.

    Raises:
        UsageError: a given folder does not exist.
    """
    for folder in given:
        if not folder.is_dir():
            raise UsageError(f"--fonts {folder}: no such folder; give folders with {', '.join(SUFFIXES)} files")
    return given or [*SYSTEM_FOLDERS, *_matplotlib_fonts()]


def find_faces(folders: Iterable[Path]) -> list[Face]:
    """Every readable face, sorted by path and index; damaged files are passed over."""
    require("fontTools")
    return [
        face
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
        for face in _faces(path)
    ]


def writes_chinese(face: Face) -> bool:
    """Whether a face has the frequent Chinese characters, in the shapes that are used in China."""
    return visible(MOST_HAN) <= face.characters and not any(part in f"{face.family} " for part in _NAMED_OTHERWISE)


def writes_latin(face: Face) -> bool:
    """Whether a face has ASCII and the letters of Latin-1; fonts of symbols lack these and draw signs for ASCII."""
    return face.characters >= _LATIN and "Math" not in face.family


def is_stand_in(face: Face) -> bool:
    """Whether a face draws the same box for every character."""
    return len(face.characters) >= PLACEHOLDER_FONT


def open_book(folders: list[Path]) -> FontBook:
    """Sort the families of some folders.

    Raises:
        DataError: none of them writes English, proportional and monospaced.
    """
    families: dict[str, dict[tuple[bool, bool], Face]] = {}
    for face in find_faces(folders):
        if face.width == NORMAL_WIDTH and face.weight in (REGULAR, BOLD):
            families.setdefault(face.family, {}).setdefault((face.weight == BOLD, face.italic), face)
    text: list[Family] = []
    mono: list[Family] = []
    chinese: list[Family] = []
    for name, styles in sorted(families.items()):
        if (False, False) not in styles:
            continue
        family = Family(name=name, faces=tuple(styles[key] for key in sorted(styles)))
        if is_stand_in(family.regular):
            continue
        if visible(MOST_HAN) <= family.regular.characters:
            if writes_chinese(family.regular):
                chinese.append(family)
        elif writes_latin(family.regular):
            (mono if family.regular.monospaced else text).append(family)
    if not text or not mono:
        missing = "monospaced font" if text else "font for English"
        raise DataError(
            f"{', '.join(map(str, folders))}: no {missing} found; install one (Debian: apt install fonts-dejavu-core) "
            "or name its folder with --fonts"
        )
    return FontBook(text=tuple(text), mono=tuple(mono), chinese=tuple(chinese))


def _matplotlib_fonts() -> Iterator[Path]:
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin:
        yield Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


def _open(path: Path) -> list[Any]:
    from fontTools.ttLib import TTCollection, TTFont

    if path.suffix.lower() in (".ttc", ".otc"):
        return list(TTCollection(path, lazy=True).fonts)
    return [TTFont(path, lazy=True)]


def _faces(path: Path) -> list[Face]:
    try:
        return [_face(font, path=path, index=index) for index, font in enumerate(_open(path))]
    except Exception:  # damaged fonts raise anything
        return []


def _face(font: Any, *, path: Path, index: int) -> Face:
    style = font["OS/2"]
    return Face(
        path=os.path.abspath(path),
        index=index,
        family=font["name"].getBestFamilyName() or "",
        weight=style.usWeightClass,
        width=style.usWidthClass,
        italic=bool(style.fsSelection & 1),
        monospaced=bool(font["post"].isFixedPitch),
    )


@cache
def _characters(path: str, index: int) -> frozenset[int]:
    return frozenset(_open(Path(path))[index].getBestCmap() or ())
