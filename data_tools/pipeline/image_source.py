"""Reads the images of a record from inside the image root, checks them, and shrinks those above the limit."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property

from data_tools.pipeline.image_map import ImageMap
from data_tools.readers.record import MAX_IMAGE, Picture, Span
from megavl.data.image import ImageError, ImageInfo, Verification, prepare_image
from megavl.data.table import ReadHandles

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """A checked image."""

    data: bytes
    info: ImageInfo


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Turns image references of records into images."""

    root: str
    """Folder that paths are relative to and may not leave, not even through symbolic links."""
    handles: ReadHandles
    """Open input files, for images stored inside them."""
    image_map: ImageMap | None
    """Finds the files of images that are named by address."""
    verify: Verification
    max_aspect: float
    max_side: int
    """Images whose longer side has more pixels are re-encoded; 0 keeps every file."""

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    def has_file(self, picture: Picture) -> bool:
        """False for an address outside the map and for a path without a file: the image was never fetched."""
        if picture.data is not None or picture.name.startswith("data:"):
            return True
        name = self._mapped(picture.name)
        if not name or "://" in name:
            return False
        try:
            self._path(name)
            return os.path.lexists(os.path.join(self.root, name))
        except (ImageError, ValueError):
            return True

    def load(self, picture: Picture) -> LoadedImage:
        """Read and check one image.

        Raises:
            ImageError: with the reason, and the reference in the message.
        """
        try:
            data, info = prepare_image(
                self._bytes(picture), verify=self.verify, max_aspect=self.max_aspect, max_side=self.max_side
            )
        except ImageError as error:
            raise ImageError(f"{picture.name[:200]}: {error}", error.reason) from error
        return LoadedImage(data=data, info=info)

    def _bytes(self, picture: Picture) -> bytes:
        data = picture.data
        if isinstance(data, Span):
            _check_size(data.size)
            return self.handles.read(data.path, offset=data.start, size=data.size)
        if data is not None:
            _check_size(len(data))
            return data
        return _inline(picture.name) if picture.name.startswith("data:") else self._read(self._mapped(picture.name))

    def _mapped(self, name: str) -> str:
        if "://" not in name or self.image_map is None:
            return name
        return self.image_map.find(name) or name

    def _path(self, name: str) -> str:
        """The path with all symbolic links resolved, so that the checked file is the one that is opened."""
        given = os.path.join(self.root, name)
        # The spelling is checked too: what follows `..` must not depend on which folders exist.
        if not _is_inside(os.path.abspath(self.root), os.path.abspath(given)):
            raise ImageError(f"outside --image-root {self.root}", "image_outside_root")
        try:
            path = os.path.realpath(given)
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot read {given} ({error})", "image_missing") from error
        if not _is_inside(self._real_root, path):
            raise ImageError(
                f"a symbolic link leads to {path}, outside --image-root {self.root}; give a folder that holds both",
                "image_outside_root",
            )
        return path

    def _read(self, name: str) -> bytes:
        if "://" in name:
            raise ImageError("an address, not a file; fetch it and name its file in --image-map", "image_address")
        path = self._path(name)
        try:
            # Opening a named pipe must not block.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot read {path} ({error})", "image_missing") from error
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            os.close(handle)
            raise ImageError(f"{path} is no ordinary file", "image_missing")
        with os.fdopen(handle, "rb") as stream:
            _check_size(status.st_size)
            return stream.read()


def _is_inside(root: str, path: str) -> bool:
    return os.path.commonpath([root, path]) == root


def _check_size(size: int) -> None:
    if size > MAX_IMAGE:
        raise ImageError(f"{size} bytes, above {MAX_IMAGE}", "image_too_large")


def _inline(reference: str) -> bytes:
    head = _DATA_URL.match(reference)
    if head is None:
        raise ImageError("a data URL must read data:image/...;base64,...", "image_format")
    _check_size((len(reference) - head.end()) // 4 * 3)
    try:
        return base64.b64decode(reference[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"not valid base64 ({error})", "image_format") from error
