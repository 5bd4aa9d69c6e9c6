"""Image files: header check, safe decoding to RGB, and the square canvas that the first stage reads.

Pillow is the only decoder. It sees neither metadata nor formats that are not listed here. Nothing is decoded before its
header has passed the limits, and a truncated file is an error, never half an image.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile as PillowFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from megavl.config.errors import DataError
from megavl.config.presets import ImageGeometry
from megavl.data.image_metadata import Kind, kind_of, pixels_of
from megavl.foreign.reading import read_limited

_PLUGINS: dict[Kind, type[PillowFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
FORMATS = tuple(_PLUGINS)
"""File formats that are opened; tables store the index."""
MAX_PIXELS = 64_000_000
MAX_ASPECT = 100.0
"""Largest ratio of the sides."""
JPEG_QUALITY = 90
"""Of re-encoded images."""
OUT_OF_MEMORY = "image_memory"
"""Reason of an image for which there was no memory."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation."""
_INTEGER_WHITES = (1, 255, 4095, 65535)
_FLOAT_WHITES = (1, 255, 65535)
"""White in images of more than 8 bits, which rarely say what their white is: the least that holds all values."""
_LARGEST = 1 << 30
"""Bytes of an image file."""
_DARKEST = 1 / 16
"""Least share of white that the highest float must reach: 1.02 is no almost black image of 0 to 255."""

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
    """Pixels, as stored (before the file's orientation)."""
    height: int
    format: Kind


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """Byte range of a stored image; enough for a decoding worker."""

    path: str
    offset: int
    size: int
    """Bytes."""
    crc32: int


def check_image(data: bytes, *, verify: Verification = "scaled", max_aspect: float = MAX_ASPECT) -> ImageInfo:
    """Check an image file. What `scaled` and `full` accept, `decode_image` decodes.

    Args:
        data: the file's bytes.
        verify: `header` decodes nothing. `scaled` decodes a JPEG at 1/8 of its size, which still notices missing
            bytes, and other formats wholly. `full` decodes everything.
        max_aspect: largest ratio of the sides.

    Raises:
        ImageError: with the reason.
    """
    opened = _open(data, max_aspect=max_aspect)
    _verify(opened, verify=verify)
    return opened.info


def prepare_image(data: bytes, *, verify: Verification, max_aspect: float, max_side: int) -> tuple[bytes, ImageInfo]:
    """Check an image file as `check_image` does, and shrink it where it is too large.

    Args:
        data: the file's bytes.
        verify: how much of a file that stays as it is is decoded.
        max_aspect: largest ratio of the sides.
        max_side: longest side in pixels; 0 keeps every file.

    Returns:
        The file itself, or a JPEG of quality 90 whose longer side is `max_side`.

    Raises:
        ImageError: with the reason.
    """
    opened = _open(data, max_aspect=max_aspect)
    if not max_side or max(opened.info.width, opened.info.height) <= max_side:
        _verify(opened, verify=verify)
        return data, opened.info
    image = _decode(opened)
    width, height = (max(1, round(side * max_side / max(image.size))) for side in image.size)
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue(), ImageInfo(width=width, height=height, format="JPEG")


def decode_image(source: bytes | str | Path, *, max_aspect: float = MAX_ASPECT) -> Image.Image:
    """Decode the first frame of an image file to upright RGB.

    Args:
        source: the file's bytes, or its path.
        max_aspect: largest ratio of the sides.

    Raises:
        ImageError: missing, empty, truncated, of another format, above 64 megapixels or too narrow.
    """
    data = source if isinstance(source, bytes) else read_image_file(Path(source))
    return _decode(_open(data, max_aspect=max_aspect))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB. Its alpha is dropped, as the original does.

    Values of more than 8 bits are scaled. White is the least of 1, 255, 4095 (not for floats) and 65535 that no value
    exceeds.

    Raises:
        ImageError: the image cannot be loaded, or its values fit none of these ranges.
    """
    with _pillow():
        image.load()
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_eight_bits(image))
        elif image.mode == "La":
            image = image.convert("LA")
        return image if image.mode == "RGB" else image.convert("RGB")


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


class _Opened(NamedTuple):
    image: PillowFile
    """Not loaded yet."""
    info: ImageInfo
    orientation: int


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it is missing, or has more than a GiB.
    """
    try:
        return read_limited(path, limit=_LARGEST)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{path}: cannot read the image ({why})", "image_missing") from error


def _open(data: bytes, *, max_aspect: float) -> _Opened:
    if not data:
        raise ImageError("the image file is empty", "image_empty")
    kind = kind_of(data)
    if kind is None:
        raise ImageError(f"not one of {', '.join(FORMATS)}", "image_format")
    with _pillow(opening=kind):
        pixels, orientation = pixels_of(data, kind=kind)
        image = _PLUGINS[kind](io.BytesIO(pixels))
        # At once: Pillow would copy what is left of the file after every 64 KiB.
        image.decodermaxblock = max(image.decodermaxblock, len(pixels))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is above {MAX_PIXELS} pixels", "image_too_large")
    if max(width, height) > max_aspect * min(width, height):
        raise ImageError(f"{width} x {height} is narrower than 1 to {max_aspect:g}", "image_aspect")
    return _Opened(image, ImageInfo(width=width, height=height, format=kind), orientation)


def _verify(opened: _Opened, *, verify: Verification) -> None:
    if verify == "scaled" and opened.info.format == "JPEG":
        with _pillow():
            opened.image.draft("RGB", (max(1, opened.info.width // 8), max(1, opened.info.height // 8)))
            opened.image.load()
    elif verify != "header":
        _decode(opened)


def _decode(opened: _Opened) -> Image.Image:
    with _pillow():
        opened.image.load()
        # A transparent colour is of no use here, and Pillow fails to convert some.
        opened.image.info.clear()
    image = to_rgb(opened.image)
    turn = _TURNS.get(opened.orientation)
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels (H, W) of an image of integers or floats, as `to_rgb` scales them."""
    deep = np.asarray(image)
    floats = deep.dtype.kind == "f"
    low, high = float(deep.min(initial=0)), float(deep.max(initial=0))
    white = next((white for white in (_FLOAT_WHITES if floats else _INTEGER_WHITES) if high <= white), None)
    # A comparison with NaN is false.
    if white is None or not low >= 0 or (floats and 1 < high < _DARKEST * white):
        raise ImageError(
            f"pixel values from {low:g} to {high:g}; scale them to 0 to 1, to 0 to 255 or to 0 to 65535", "image_values"
        )
    if floats:
        pixels = np.rint(deep * (255 / white)).astype(np.uint8)
    elif white == 1:
        pixels = (deep * 255).astype(np.uint8)
    else:
        pixels = (deep >> (white.bit_length() - 8)).astype(np.uint8)
    # Pillow inverts 8 bits itself.
    inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    return 255 - pixels if inverted else pixels


@contextmanager
def _pillow(*, opening: Kind | None = None) -> Iterator[None]:
    """Turn whatever decoders of hostile files raise into ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("there is no memory for it", OUT_OF_MEMORY) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"above {MAX_PIXELS} pixels", "image_too_large") from error
    except Exception as error:
        why = str(error) or type(error).__name__
        if opening and isinstance(error, SyntaxError) and not isinstance(error.msg, Exception):
            # Pillow's sign for a kind that it does not know. Where bytes are missing, it wraps another error.
            raise ImageError(f"a kind of {opening} that cannot be opened ({why})", "image_format") from error
        raise ImageError(f"truncated or damaged ({why})", "image_truncated") from error
