"""Fonts on this machine: which families support English or Chinese, and which characters each of them has.

A renderer draws an empty box for a character that its font lacks. Text is therefore checked here before rendering.
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
"""Values of usWeightClass and usWidthClass (OpenType specification, table OS/2)."""

PLACEHOLDER_CHARACTERS = 100_000
"""A font with this many characters draws only placeholders, such as the Last Resort font."""
FREQUENT_HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过"
"""Frequent Chinese characters; a font that lacks one of them is made for another language."""

_ASCII = frozenset(range(0x20, 0x7F))
_LATIN = _ASCII | set(range(0xC0, 0x100)) - {0xD7, 0xF7}
_OTHER_REGIONS = (" JP", " KR", " TC", " HK", " TW")

NO_CHINESE_FONT = (
    "no font here has the Chinese characters; install one (Debian: apt install fonts-wqy-microhei or fonts-noto-cjk)"
)


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face of one font file."""

    path: str
    index: int
    """Index in a font collection; 0 in other files."""
    family: str
    weight: int
    width: int
    italic: bool
    monospaced: bool

    @property
    def characters(self) -> frozenset[int]:
        """Code points that have a glyph."""
        return _characters(self.path, self.index)

    def covers(self, text: str) -> bool:
        """Whether every visible character of a text has a glyph."""
        return needed_glyphs(text) <= self.characters

    @property
    def is_placeholder(self) -> bool:
        """Whether the face draws the same box for every character."""
        return len(self.characters) >= PLACEHOLDER_CHARACTERS


@dataclass(frozen=True)
class Family:
    """Faces of one name: regular, and bold and italic if they exist."""

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
class Fonts:
    """Usable families by purpose, each list sorted by name."""

    text: tuple[Family, ...]
    mono: tuple[Family, ...]
    chinese: tuple[Family, ...]


def needed_glyphs(text: str) -> frozenset[int]:
    """Code points of a text that need a glyph."""
    return frozenset(ord(character) for character in text if not character.isspace())


def font_folders(given: list[Path]) -> list[Path]:
    """The given folders, or else the system's font folders and the fonts that matplotlib ships.

    Raises:
        UsageError: a given folder does not exist.
    """
    for folder in given:
        if not folder.is_dir():
            raise UsageError(f"--fonts {folder}: no such folder; give folders with {', '.join(SUFFIXES)} files")
    return given or [*SYSTEM_FOLDERS, *_matplotlib_fonts()]


def find_faces(folders: Iterable[Path]) -> list[Face]:
    """Every readable face, sorted by path and index; skips damaged files."""
    require("fontTools")
    return [
        face
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
        for face in _faces(path)
    ]


def supports_chinese(face: Face) -> bool:
    """Whether a face has the frequent Chinese characters, in the forms used in mainland China."""
    return face.covers(FREQUENT_HAN) and not any(part in f"{face.family} " for part in _OTHER_REGIONS)


def supports_latin(face: Face) -> bool:
    """Whether a face has ASCII and the letters of Latin-1; symbol fonts lack these letters."""
    return face.characters >= _LATIN and "Math" not in face.family


def no_font(folders: list[Path], *, missing: str) -> DataError:
    """The error for folders that lack a font."""
    return DataError(
        f"{', '.join(map(str, folders))}: no {missing} found; install one (Debian: apt install fonts-dejavu-core) "
        "or name its folder with --fonts"
    )


def load_fonts(folders: list[Path]) -> Fonts:
    """Group the families of some folders by purpose.

    Raises:
        DataError: there is no proportional or no monospaced font for English.
    """
    families: dict[str, dict[tuple[bool, bool], Face]] = {}
    for face in find_faces(folders):
        if face.width == NORMAL_WIDTH and face.weight in (REGULAR, BOLD):
            families.setdefault(face.family, {}).setdefault((face.weight == BOLD, face.italic), face)
    text: list[Family] = []
    mono: list[Family] = []
    chinese: list[Family] = []
    for name, styles in sorted(families.items()):
        if (False, False) not in styles or styles[False, False].is_placeholder:
            continue
        family = Family(name=name, faces=tuple(styles[key] for key in sorted(styles)))
        if family.regular.covers(FREQUENT_HAN):
            if supports_chinese(family.regular):
                chinese.append(family)
        elif supports_latin(family.regular):
            (mono if family.regular.monospaced else text).append(family)
    if not text or not mono:
        raise no_font(folders, missing="monospaced font" if text else "font for English")
    return Fonts(text=tuple(text), mono=tuple(mono), chinese=tuple(chinese))


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
    except Exception:  # a damaged font can raise any exception
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
