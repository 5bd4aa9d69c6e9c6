"""Reads the images of a record from inside the image roots, checks them, and shrinks those above the limit."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote_to_bytes

from data_tools.pipeline.image_map import ImageMap, open_image_map
from data_tools.pipeline.job import Input, Job
from data_tools.readers.record import Picture, Span
from megavl.data.image import ImageError, ImageInfo, Verification, prepare_image
from megavl.data.inline_image import MAX_IMAGE, inline_image, is_inline
from megavl.data.table import ReadHandles

_FILE_URL = re.compile(r"file:(//(?P<host>[^/]*))?(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """A checked image."""

    data: bytes
    info: ImageInfo


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Turns image references of records into images."""

    roots: tuple[str, ...]
    """Folders that paths are relative to and may not leave. The first that holds a file wins."""
    follow_links: bool
    """Let symbolic links inside a root lead out of all roots."""
    handles: ReadHandles
    """Open input files, for images stored inside them."""
    image_map: ImageMap | None
    """Finds the files of images that are named by address."""
    verify: Verification
    max_aspect: float
    max_side: int
    """Images whose longer side has more pixels are re-encoded; 0 keeps every file."""

    @cached_property
    def _roots(self) -> tuple[str, ...]:
        return tuple(os.path.abspath(root) for root in self.roots)

    @cached_property
    def _real_roots(self) -> tuple[str, ...]:
        return tuple(os.path.realpath(root) for root in self.roots)

    def path_of(self, picture: Picture) -> str | None:
        """The path that a picture names; None for an image inside the record, and for an address without a file."""
        if is_inside_record(picture):
            return None
        try:
            return _local(self._mapped(picture.name))
        except ImageError:
            return None

    def holds(self, path: str) -> bool:
        """Whether a root holds something at a path, readable or not."""
        return any(os.path.lexists(candidate) for candidate in self._candidates(path))

    def leads_out(self, path: str) -> str | None:
        """Where the links at a path lead, if all of them lead where they may not."""
        reals = [os.path.realpath(candidate) for candidate in self._candidates(path) if os.path.lexists(candidate)]
        return None if not reals or any(map(self._is_allowed, reals)) else reals[0]

    def has_file(self, picture: Picture) -> bool:
        """False for an address outside the map and for a path without a file: the image was never fetched."""
        if is_inside_record(picture):
            return True
        name = self._mapped(picture.name)
        if not name or is_address(name):
            return False
        path = self.path_of(picture)
        # What leads out of the roots is no missing file: it is refused when it is read.
        return path is None or self.holds(path) or not self._candidates(path)

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
        if data is None and not is_inline(picture.name):
            return self._read(_local(self._mapped(picture.name)))
        data = inline_image(picture.name) if data is None else data
        _check_size(len(data))
        return data

    def _mapped(self, name: str) -> str:
        if "://" not in name or self.image_map is None:
            return name
        return self.image_map.find(name) or name

    def _candidates(self, path: str) -> list[str]:
        """Where a path may lie. `..` is resolved by its spelling, which must not depend on which folders exist."""
        # POSIX gives two leading slashes a meaning of their own, which Linux does not.
        path = "/" + path.lstrip("/") if path.startswith("//") else path
        # Windows writes `images\\a.jpg`; a file that is called so all the same comes first.
        names = dict.fromkeys((path, path.replace("\\", "/")))
        given = ((root, os.path.normpath(os.path.join(root, name))) for name in names for root in self._roots)
        return [candidate for root, candidate in given if _is_inside(root, candidate)]

    def _read(self, path: str) -> bytes:
        candidates = self._candidates(path)
        if not candidates:
            raise ImageError(f"outside --image-root {' '.join(self.roots)}", "image_outside_root")
        refusal: ImageError | None = None
        for candidate in candidates:
            try:
                return self._read_file(candidate)
            except ImageError as error:
                # The reason to tell is that of the first file that is there.
                if refusal is None or (refusal.reason == "image_missing" != error.reason):
                    refusal = error
        assert refusal is not None
        raise refusal

    def _read_file(self, path: str) -> bytes:
        try:
            # The checked file is the one that is opened, with all links resolved. Opening a named pipe must not block.
            real = os.path.realpath(path)
            self._check_link(real)
            handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK)
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                os.close(handle)
                raise ImageError(f"{path} is no ordinary file", "image_missing")
            with os.fdopen(handle, "rb", buffering=0) as stream:
                _check_size(status.st_size)
                return stream.read()
        except ImageError:
            raise
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot read {path[:200]} ({error})", "image_missing") from error

    def _is_allowed(self, real: str) -> bool:
        """Whether a file may be read that links lead to."""
        return self.follow_links or any(_is_inside(root, real) for root in self._real_roots)

    def _check_link(self, real: str) -> None:
        if not self._is_allowed(real):
            raise ImageError(
                f"a symbolic link leads to {real}, outside --image-root {' '.join(self.roots)}; allow such links with "
                "--follow-links, or add the folder to --image-root",
                "image_outside_root",
            )


def is_inside_record(picture: Picture) -> bool:
    """Whether a record holds the image itself, as bytes or as text."""
    return picture.data is not None or is_inline(picture.name)


def open_image_source(job: Job, source: Input, *, handles: ReadHandles) -> ImageSource:
    """Where the images of an input are read from, with the settings of its job."""
    return ImageSource(
        roots=job.image_root if job.image_root is not None else (str(Path(source.path).parent),),
        follow_links=job.follow_links,
        handles=handles,
        image_map=open_image_map(job.image_map) if job.image_map is not None else None,
        verify=job.verify,
        max_aspect=job.max_aspect,
        max_side=job.max_side,
    )


def _local(name: str) -> str:
    """The path of a name that may be a `file:` URL.

    Raises:
        ImageError: it is an address on another machine.
    """
    if name[:5].lower() == "file:" and (match := _FILE_URL.fullmatch(name)):
        if (match["host"] or "localhost").lower() != "localhost":
            host = match["host"][:200]
            raise ImageError(
                f"a file on the host {host}; write file:///, followed by an absolute path", "image_address"
            )
        try:
            return os.fsdecode(unquote_to_bytes(match["path"] or ""))
        except UnicodeEncodeError as error:
            raise ImageError(f"not a file URL ({error})", "image_missing") from error
    if is_address(name):
        raise ImageError("an address, not a file; fetch it and name its file in --image-map", "image_address")
    return name


def is_address(name: str) -> bool:
    """Whether a reference names an image on another machine."""
    return "://" in name and name[:5].lower() != "file:"


def _is_inside(root: str, path: str) -> bool:
    return path == root or path.startswith(root if root == "/" else root + "/")


def _check_size(size: int) -> None:
    if size > MAX_IMAGE:
        raise ImageError(f"{size} bytes, above {MAX_IMAGE}", "image_too_large")
