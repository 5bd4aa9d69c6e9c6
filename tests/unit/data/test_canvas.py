"""Decoding and the canvas rule."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavl.config.presets import IMAGE_PRESETS
from megavl.data.image import ImageError, ImageInfo, blank_canvas, canvas, check_image, decode_image, prepare_image

GEOMETRY = IMAGE_PRESETS["tiny-hybrid"]


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels worth speaking of."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = Image.effect_noise((300, 200), 60).convert("RGB")


@pytest.mark.parametrize("size", [(640, 480), (101, 333), (1, 90), (256, 256), (20, 30), (90, 1)])
def test_canvas_follows_the_original_processor(size: tuple[int, int]) -> None:
    image = NOISE.resize(size)
    got = canvas(image, geometry=GEOMETRY)
    # deepseek_vl/models/image_processing_vlm.py: resize, then expand2square.
    width, height = image.size
    longest = max(width, height)
    side = GEOMETRY.canvas_size
    target = (max(int(width / longest * side), 14), max(int(height / longest * side), 14))
    resized = image.resize(target, Image.Resampling.BICUBIC)
    expected = Image.new("RGB", (side, side), (122, 116, 104))
    offset = ((side - target[0]) // 2, 0) if target[0] < target[1] else (0, (side - target[1]) // 2)
    expected.paste(resized, offset)
    assert got.dtype == np.uint8 and got.shape == (3, side, side) and got.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(got, np.asarray(expected).transpose(2, 0, 1))


def test_blank_canvas_is_background() -> None:
    assert blank_canvas(GEOMETRY)[:, 0, 0].tolist() == [122, 116, 104]
    assert blank_canvas(GEOMETRY).shape == (3, GEOMETRY.canvas_size, GEOMETRY.canvas_size)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = NOISE.convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode_image(_bytes(image, kind))
    assert decoded.mode == "RGB" and decoded.size == NOISE.size


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(_bytes(Image.fromarray(ramp))))[..., 0]
    np.testing.assert_array_equal(decoded, (ramp // 256).astype(np.uint8))


def test_upright_and_first_frame() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(_bytes(NOISE, "JPEG", exif=exif.tobytes())).size == (200, 300)
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    decoded = decode_image(_bytes(red, "GIF", save_all=True, append_images=[blue]))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


ZOO: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "image_empty"),
    "html": (lambda: b"<html>not found</html>", "image_format"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_format"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_format"),
    "cut jpeg": (lambda: _bytes(NOISE, "JPEG")[:-2000], "image_truncated"),
    "cut png": (lambda: _bytes(NOISE)[:-2000], "image_truncated"),
    "large": (lambda: _png_header(12_000, 12_000), "image_too_large"),
    "bomb": (lambda: _png_header(14_000, 14_000), "image_too_large"),
    "narrow": (lambda: _png_header(1, 200_000), "image_aspect"),
}


@pytest.mark.parametrize("name", ZOO)
def test_unusable_files_are_refused_with_their_reason(name: str) -> None:
    make, reason = ZOO[name]
    data = make()
    with pytest.raises(ImageError) as caught:
        check_image(data)
    assert caught.value.reason == reason
    with pytest.raises(ImageError):
        decode_image(data)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="gone.png") as caught:
        decode_image(tmp_path / "gone.png")
    assert caught.value.reason == "image_missing"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_only_large_images_are_encoded_again(kind: str) -> None:
    data = _bytes(NOISE, kind)
    kept, info = prepare_image(data, verify="scaled", max_aspect=100, max_side=300)
    assert kept is data and info == check_image(data) == ImageInfo(width=300, height=200, format=kind)
    small, info = prepare_image(data, verify="header", max_aspect=100, max_side=100)
    assert info == check_image(small) == ImageInfo(width=100, height=67, format="JPEG")
    for limit in (0, 100, 300):
        with pytest.raises(ImageError) as caught:
            prepare_image(data[:-1000], verify="scaled", max_aspect=100, max_side=limit)
        assert caught.value.reason == "image_truncated"
