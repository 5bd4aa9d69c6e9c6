"""Image files: header check, safe decoding to RGB, and the square canvas that the first stage reads.

Pillow is the only decoder. Nothing is decoded before its header has passed the limits, and a truncated file is an
error, never half an image.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from megavl.config.errors import DataError
from megavl.config.presets import ImageGeometry

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""File formats that are opened; tables store the index."""
MAX_PIXELS = 64_000_000
MAX_ASPECT = 100.0
"""Largest ratio of the sides."""
JPEG_QUALITY = 90
"""Of re-encoded images."""

Verification = Literal["header", "scaled", "full"]


class ImageError(DataError):
    """An image that cannot be used; `reason` is the word under which reports count it."""

    def __init__(self, message: str, reason: str = "image_format") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What the header says."""

    width: int
    """Pixels, as stored (before EXIF rotation)."""
    height: int
    format: str


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """Byte range of a stored image; enough for a decoding worker."""

    path: str
    offset: int
    size: int
    """Bytes."""
    crc32: int


def check_image(data: bytes, *, verify: Verification = "scaled", max_aspect: float = MAX_ASPECT) -> ImageInfo:
    """Check an image file.

    Args:
        data: the file's bytes.
        verify: `header` decodes nothing. `scaled` decodes a JPEG at 1/8 of its size, which still notices missing
            bytes. It compares the checksums of a PNG, and decodes other formats wholly. `full` decodes everything.
        max_aspect: largest ratio of the sides.

    Raises:
        ImageError: with the reason.
    """
    image = _open(data, max_aspect=max_aspect)
    info = ImageInfo(width=image.width, height=image.height, format=str(image.format))
    if verify == "scaled" and image.format == "PNG":
        _load(image, step=image.verify)
    elif verify == "scaled":
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        _load(image)
    elif verify == "full":
        _load(image)
    return info


def decode_image(source: bytes | str | Path, *, max_aspect: float = MAX_ASPECT) -> Image.Image:
    """Decode an image file to upright RGB: first frame, 16-bit grey scaled to 8, alpha dropped as the original does.

    Args:
        source: the file's bytes, or its path.
        max_aspect: largest ratio of the sides.

    Raises:
        ImageError: missing, empty, truncated, of another format, above 64 megapixels or too narrow.
    """
    data = source if isinstance(source, bytes) else _read(Path(source))
    image = _open(data, max_aspect=max_aspect)
    _load(image)
    ImageOps.exif_transpose(image, in_place=True)
    upright: Image.Image = image
    if upright.mode.startswith("I"):
        # A plain conversion clips 16 bits to white.
        deep = np.asarray(upright).astype(np.int64)
        scale = 256 if upright.mode.startswith("I;16") or deep.max(initial=0) > 255 else 1
        upright = Image.fromarray(np.clip(deep // scale, 0, 255).astype(np.uint8))
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def canvas(
    image: Image.Image, *, geometry: ImageGeometry, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """The square uint8 canvas (3, C, C) of an RGB image.

    Source: deepseek_vl/models/image_processing_vlm.py:127-162. Sides are truncated, the filter is Pillow's bicubic,
    and the image is centred on the background colour.

    Args:
        image: RGB.
        geometry: of the canvas.
        out: (3, C, C), filled and returned; default: a new array.
    """
    size, longest = geometry.canvas_size, max(image.size)
    width, height = (max(int(side / longest * size), geometry.min_size) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = np.empty((3, size, size), np.uint8) if out is None else out
    left, top = (size - width) // 2, (size - height) // 2
    # Band by band: numpy would take three times as long to bring interleaved colours into this order.
    for band, colour, pixels in zip(square, geometry.background, image.split()):
        band[:top] = band[top + height :] = colour
        band[:, :left] = band[:, left + width :] = colour
        band[top : top + height, left : left + width] = np.frombuffer(pixels.tobytes(), np.uint8).reshape(height, width)
    return square


def blank_canvas(geometry: ImageGeometry) -> npt.NDArray[np.uint8]:
    """A canvas (3, C, C) of background colour alone."""
    side = geometry.canvas_size
    colour = np.array(geometry.background, np.uint8).reshape(3, 1, 1)
    return np.ascontiguousarray(np.broadcast_to(colour, (3, side, side)))


def shrink(data: bytes, *, max_side: int) -> bytes:
    """The file itself when its longer side is at most `max_side`; otherwise a JPEG of that size, quality 90.

    Raises:
        ImageError: as `decode_image`.
    """
    if max(_open(data, max_aspect=float("inf")).size) <= max_side:
        return data
    image = decode_image(data, max_aspect=float("inf"))
    longest = max(image.size)
    width, height = (max(1, round(side * max_side / longest)) for side in image.size)
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot read the image ({error.strerror})", "image_missing") from error


def _open(data: bytes, *, max_aspect: float) -> Image.Image:
    if not data:
        raise ImageError("the image file is empty", "image_empty")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns; ours below is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"above {MAX_PIXELS} pixels", "image_too_large") from error
    except Exception as error:  # decoders of hostile files raise anything
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            # Unlike the others it is looked through when it is opened.
            raise ImageError("truncated or damaged", "image_truncated") from error
        raise ImageError(f"not one of {', '.join(FORMATS)}", "image_format") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is above {MAX_PIXELS} pixels", "image_too_large")
    if max(width, height) > max_aspect * min(width, height):
        raise ImageError(f"{width} x {height} is narrower than 1 to {max_aspect:g}", "image_aspect")
    return image


def _load(image: Image.Image, *, step: Callable[[], object] | None = None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (step or image.load)()
    except MemoryError:
        raise
    except Exception as error:  # decoders of hostile files raise anything
        raise ImageError(f"truncated or damaged ({error})", "image_truncated") from error
