"""Image bytes of a record: found inside the image root, checked, and made smaller where they exceed the limit."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from dataclasses import dataclass

from megavl.data.image import ImageError, ImageInfo, Verification, check_image, shrink

MAX_FILE = 256 << 20
"""Largest image file that is read, bytes."""


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """A checked image."""

    reference: str
    """As the record names it."""
    data: bytes
    info: ImageInfo


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """How references in records become images."""

    root: str
    """Folder that paths are relative to and may not leave."""
    verify: Verification
    max_aspect: float
    max_side: int
    """Longer side in pixels above which an image is re-encoded; 0 keeps every file as it is."""

    def load(self, reference: str) -> LoadedImage:
        """Read and check one image.

        Raises:
            ImageError: with the reason, and the reference in the message.
        """
        try:
            data = _inline(reference) if reference.startswith("data:") else self._read(reference)
            info = check_image(data, verify=self.verify, max_aspect=self.max_aspect)
            if self.max_side and max(info.width, info.height) > self.max_side:
                data = shrink(data, max_side=self.max_side)
                info = check_image(data, verify="header", max_aspect=float("inf"))
        except ImageError as error:
            raise ImageError(f"{reference[:200]}: {error}", error.reason) from error
        return LoadedImage(reference=reference, data=data, info=info)

    def _read(self, reference: str) -> bytes:
        if "://" in reference:
            raise ImageError("an address, not a file; fetch the images first", "image_address")
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, reference))
        if os.path.commonpath([root, path]) != root:
            raise ImageError(f"outside --image-root {self.root}", "image_outside_root")
        try:
            # Not blocking: a named pipe must not stop the run.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot read {path} ({error})", "image_missing") from error
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            os.close(handle)
            if stat.S_ISREG(status.st_mode):
                raise ImageError(f"{status.st_size} bytes, above {MAX_FILE}", "image_too_large")
            raise ImageError(f"{path} is no ordinary file", "image_missing")
        with os.fdopen(handle, "rb") as stream:
            return stream.read()


def _inline(reference: str) -> bytes:
    head, comma, body = reference.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError("a data URL must read data:image/...;base64,...", "image_format")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"not valid base64 ({error})", "image_format") from error
