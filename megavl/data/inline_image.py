"""Images written as text: data URLs, and base64 without one."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from megavl.data.image import ImageError
from megavl.data.image_metadata import kind_of

MAX_IMAGE = 256 << 20
"""Largest image file, and largest sum of the image files of one record, bytes."""
_DATA_URL = re.compile(r"\s*data:([^,]{0,1000}),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
_SHORTEST = 40
"""Characters; no image file is shorter in base64."""
_LONGEST_PATH = 4096
"""Characters; Linux has no longer paths."""
_START = 256
"""Characters that show the kind of an image, with spaces between them."""
_SPACE = b" \t\r\n\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")


def is_inline(name: str) -> bool:
    """Whether a reference holds the image itself, and is no path or address."""
    if name.lstrip()[:5].lower() == "data:":
        return True
    too_long = len(name) > _LONGEST_PATH and _BASE64.fullmatch(name, 0, _LONGEST_PATH + 1) is not None
    return too_long or is_base64_image(name)


def is_base64_image(text: str) -> bool:
    """Whether a text is an image file in base64: its first bytes tell, since `/9j/` may also begin a path."""
    if len(text) < _SHORTEST or _BASE64.fullmatch(text, 0, _LONGEST_PATH + 1) is None:
        return False
    start = "".join(text[:_START].split())
    try:
        return kind_of(_decoded(start[: len(start) // 4 * 4])) is not None
    except ImageError:
        return False


def inline_image(name: str) -> bytes:
    """The image file of a reference that is inline. Base64 may be broken into lines, unpadded, or in either alphabet.

    Raises:
        ImageError: `image_format`, it cannot be decoded; `image_too_large`.
    """
    if name.lstrip()[:5].lower() != "data:":
        return _decoded(name)
    match = _DATA_URL.match(name)
    if match is None:
        raise ImageError("a data URL must read data:image/...;base64,...", "image_format")
    content = name[match.end() :]
    packed = match[1].lower().rstrip().endswith("base64") or is_inline(content)
    if packed and "%" not in content:
        return _decoded(content)
    try:
        data = unquote_to_bytes(content)
    except UnicodeEncodeError as error:
        raise ImageError(f"not a data URL ({error})", "image_format") from error
    return _decoded(data.decode("latin-1")) if packed else data


def _decoded(text: str) -> bytes:
    """Base64 to bytes."""
    if len(text) // 4 * 3 > 2 * MAX_IMAGE:
        raise ImageError(f"more than {MAX_IMAGE} bytes", "image_too_large")
    try:
        plain = text.encode("ascii").translate(_STANDARD, _SPACE).rstrip(b"=")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"not valid base64 ({error})", "image_format") from error
