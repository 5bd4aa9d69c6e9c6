"""The content of a packed sequence in readable form: segments, pieces of text with their loss mask, images."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megavl.config.presets import ImageGeometry
from megavl.data.dataset import Dataset, Member, PackedSequence, Source
from megavl.data.image import FORMATS, ImageError, ImageFile, check_image, decode_image
from megavl.data.manifest import MODALITIES, Modality
from megavl.data.table import ReadHandles
from megavl.data.tokenizer import Tokenizer

THUMBNAIL = 176
"""Longer side of a thumbnail, pixels."""
_CONTEXT = 4
"""Tokens before a piece that are decoded with it, because some tokenizers drop the space at the start of a text."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, each of which may be its own token."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of a segment."""

    title: str
    """Size and format, or why it cannot be shown."""
    thumbnail: bytes
    """A small JPEG; empty when the image cannot be shown."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens that form whole characters, or one image."""

    start: int
    """First position in the sequence."""
    ids: tuple[int, ...]
    """Empty for an image."""
    text: str
    special: bool
    supervised: bool
    """Whether its positions count in the loss."""
    picture: Picture | None = None
    tokens: int = 1
    """Number of positions."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One sample."""

    origin: str
    tokens: int
    supervised: int
    images: int
    damage: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class PackView:
    """One packed sequence."""

    number: int
    modality: Modality
    seq_length: int
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def supervised(self) -> int:
        """Number of positions that count in the loss."""
        return sum(segment.supervised for segment in self.segments)

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(segment.images for segment in self.segments)


class PackReader:
    """Reads packed sequences of one dataset."""

    def __init__(self, path: str | Path, *, tokenizer: Tokenizer | None) -> None:
        """Open a dataset; without its tokenizer, ids are shown.

        Raises:
            DataError: the dataset is unfinished or damaged.
        """
        self._handles = ReadHandles()
        self.source = Source(path, handles=self._handles)
        entry = self.source.manifest.geometry
        geometry = ImageGeometry(
            canvas_size=entry.canvas_size,
            low_size=entry.low_size,
            patch_size=entry.patch_size,
            min_size=entry.min_size,
            background=entry.background,
        )
        pad = self.source.manifest.tokenizer.pad_id
        self._dataset = Dataset([self.source], weights=[], pad_id=pad, geometry=geometry, handles=self._handles)
        self._tokenizer = tokenizer

    def view(self, number: int) -> PackView:
        """Sequence `number` of the dataset; text sequences come first."""
        first = self.source.counts["text"]
        modality: Modality = MODALITIES[number >= first]
        packed = self._dataset.read(source=0, modality=modality, index=number - first * (number >= first))
        return PackView(
            number=number,
            modality=modality,
            seq_length=len(packed.tokens),
            segments=tuple(self._segment(packed, member) for member in packed.members),
        )

    def _segment(self, packed: PackedSequence, member: Member) -> Segment:
        return Segment(
            origin=member.origin,
            tokens=member.end - member.start,
            supervised=int(packed.supervised[member.start : member.end].sum()),
            images=len(member.images),
            damage=member.damage,
            pieces=tuple(self._pieces(packed, member)),
        )

    def _pieces(self, packed: PackedSequence, member: Member) -> Iterator[Piece]:
        entry, size = self.source.manifest.tokenizer, self.source.manifest.geometry.tokens
        ids, mask = packed.tokens.tolist(), packed.supervised.tolist()
        # Of equal ids the last name counts, and no sample holds padding.
        names = {entry.pad_id: "PAD", entry.bos_id: "BOS", entry.eos_id: "EOS"}
        images, position = iter(member.images), member.start
        while position < member.end:
            token = ids[position]
            if token == entry.image_id:
                file = next(images, None)
                shown = None if file is None else self._picture(file)
                yield Piece(
                    start=position, ids=(), text="", special=True, supervised=mask[position], picture=shown, tokens=size
                )
                position += size
            elif token in names:
                name = "BOS" if token == entry.bos_id and position == member.start else names[token]
                yield Piece(start=position, ids=(token,), text=name, special=True, supervised=mask[position])
                position += 1
            else:
                before = ids[max(member.start, position - _CONTEXT) : position]
                text, count = self._text(before, ids[position : member.end])
                group = tuple(ids[position : position + count])
                yield Piece(
                    start=position, ids=group, text=text, special=False, supervised=mask[position], tokens=len(group)
                )
                position += count

    def _text(self, before: Sequence[int], following: Sequence[int]) -> tuple[str, int]:
        """Text of the fewest following tokens that form whole characters, and their number."""
        if self._tokenizer is None:
            return f" {following[0]}", 1
        start = len(self._tokenizer.decode(before))
        for count in range(1, min(_LONGEST_CHARACTER, len(following)) + 1):
            text = self._tokenizer.decode([*before, *following[:count]])[start:]
            if text and "�" not in text:
                return text, count
        return self._tokenizer.decode(following[:1]) or f"[{following[0]}]", 1

    def _picture(self, file: ImageFile) -> Picture:
        data = self._handles.read(file.path, offset=file.offset, size=file.size)
        try:
            info = check_image(data, verify="header", max_aspect=float("inf"))
            image = decode_image(data, max_aspect=float("inf"))
        except ImageError as error:
            return Picture(title=f"cannot be shown: {error}", thumbnail=b"")
        assert info.format in FORMATS
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85)
        return Picture(title=f"{info.width} x {info.height} {info.format}", thumbnail=out.getvalue())
