"""Kinds of image files that people have: modes, metadata that are damaged or large, several pictures in one file."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.ExifTags import Base

from megavl.data.image import FORMATS, ImageError, check_image, decode_image, to_rgb

SIZE = (48, 32)
RAMP = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])
GREY = Image.fromarray((RAMP / 257).round().astype(np.uint8))
# Left is red, right is blue, so that every orientation can be told.
PICTURE = Image.merge(
    "RGB", (GREY, GREY.transpose(Image.Transpose.ROTATE_180), GREY.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
)
ANY_EXIF = b"II*\0\x08\0\0\0\x02\0\0\x01\x08\0\x01\0\0\0\xfd\xff\0\0"
TURNED_6 = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    """Pixels of a file that every verification accepts."""
    for verify in ("header", "scaled", "full"):
        check_image(data, verify=verify)
    return np.asarray(decode_image(data))


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _in_jpeg(*segments: bytes) -> bytes:
    data = _bytes(PICTURE, "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _in_png(*chunks: bytes, last: bool = False) -> bytes:
    data = _bytes(PICTURE)
    at = len(data) - 12 if last else 33
    return data[:at] + b"".join(chunks) + data[at:]


def _in_webp(*chunks: tuple[bytes, bytes], flags: int = 0) -> bytes:
    data = _bytes(PICTURE, "WEBP", lossless=True)
    sizes = struct.pack("<I", SIZE[0] - 1)[:3] + struct.pack("<I", SIZE[1] - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<II", 10, flags) + sizes + data[12:]
    body += b"".join(
        kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(pixels: np.ndarray, tags: dict[int, tuple[int, int]], *, big: bool = False) -> bytes:
    """A TIFF of one strip; tags are (type, value), beside those of every image."""
    order = ">" if big else "<"
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = 8 * pixels.dtype.itemsize
    own = {256: (4, pixels.shape[1]), 257: (4, pixels.shape[0]), 258: (3, bits), 259: (3, 1), 262: (3, 1), 273: (4, 8)}
    own |= {277: (3, 1), 278: (4, pixels.shape[0]), 279: (4, len(data)), **tags}
    entries = [
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(order + ("H2x" if kind == 3 else "I"), value)
        for tag, (kind, value) in sorted(own.items())
    ]
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)


def _bad_exif(name: str) -> bytes:
    exif = {
        "no header": b"Exif\0\0",
        "no directory": b"Exif\0\0II*\0\xff\xff\xff\xff",
        "noise": b"Exif\0\0" + bytes(range(200)),
        "many entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(100)),
        "wrong types": b"Exif\0\0II*\0\x08\0\0\0\x03\0" + b"".join(
            struct.pack("<HHII", tag, 200, 0xFFFFFFFF, 0xFFFFFFF0) for tag in (0x011A, 0x0128, 0x8769)),
        "an orientation of 9": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0",
    }  # fmt: skip
    return exif[name]


@pytest.mark.parametrize(
    "name", ["no header", "no directory", "noise", "many entries", "wrong types", "an orientation of 9"]
)
def test_damaged_exif_leaves_the_pixels(name: str) -> None:
    exif = _bad_exif(name)
    np.testing.assert_array_equal(_pixels(_in_jpeg(_segment(0xE1, exif))), _pixels(_bytes(PICTURE, "JPEG")))
    for data in (_in_png(_chunk(b"eXIf", exif[6:])), _in_webp((b"EXIF", exif), flags=8)):
        np.testing.assert_array_equal(_pixels(data), np.asarray(PICTURE))


@pytest.mark.parametrize("exif", [ANY_EXIF + TURNED_6, b"II*\0\x08\0\0\0\xf0\0" + TURNED_6 + b"\xff" * 9])
def test_damaged_exif_still_tells_the_orientation(exif: bytes) -> None:
    upright = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    for data in (_in_png(_chunk(b"eXIf", exif)), _in_webp((b"EXIF", exif), flags=8)):
        np.testing.assert_array_equal(_pixels(data), upright)
    assert _pixels(_in_jpeg(_segment(0xE1, b"Exif\0\0" + exif))).shape == upright.shape


ENDS = {
    "photoshop": lambda: _in_jpeg(_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4")),
    "short jfif": lambda: _in_jpeg(_segment(0xE0, b"JFIF\0")),
    "short adobe": lambda: _in_jpeg(_segment(0xEE, b"Adobe\0")),
    "icc": lambda: _in_jpeg(_segment(0xE2, b"ICC_PROFILE\0")),
    "mpf": lambda: _in_jpeg(_segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")),
    "xmp": lambda: _in_jpeg(_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff\xfe" * 9)),
    "large icc": lambda: _in_png(_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3 << 20)))),
    "icc method": lambda: _in_png(_chunk(b"iCCP", b"p\0\7")),
    "large text": lambda: _in_png(_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20))), last=True),
    "much text": lambda: _in_png(*[_chunk(b"tEXt", b"a\0" + b"x" * 900_000)] * 80),
    "itxt": lambda: _in_png(_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3 << 20)))),
    "short text": lambda: _in_png(*(_chunk(kind, b"a\0\1") for kind in (b"tEXt", b"zTXt", b"iTXt"))),
    "short chunks": lambda: _in_png(*(_chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tRNS"))),
    "animation": lambda: _in_png(_chunk(b"acTL", b""), _chunk(b"fcTL", b"")),
    "checksum of text": lambda: _in_png(_chunk(b"tEXt", b"a\0b")[:-1] + b"\0"),
    "cut text": lambda: _in_png(struct.pack(">I", 999) + b"tEXt", last=True),
    "raw exif": lambda: _in_png(_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nxyz"), last=True),
    "cut exif": lambda: _in_webp((b"EXIF", b"II*\0"), flags=8)[:-1],
    "webp icc": lambda: _in_webp((b"ICCP", b"?"), (b"XMP ", b"?!"), flags=0x24),
    "tiff tags": lambda: _bytes(PICTURE, "TIFF", tiffinfo={282: 0.0, 296: 3, 270: "x" * 999, 34675: b"?"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_metadata_never_refuse_an_image(name: str) -> None:
    data = ENDS[name]()
    kind = "JPEG" if data[:2] == b"\xff\xd8" else "PNG"
    np.testing.assert_array_equal(_pixels(data), np.asarray(Image.open(io.BytesIO(_bytes(PICTURE, kind)))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    options = {"WEBP": {"lossless": True}, "TIFF": {"tiffinfo": {274: orientation}}}.get(kind, {})
    data = _bytes(PICTURE, kind, **({} if kind == "TIFF" else {"exif": exif.tobytes()}), **options)
    upright = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    expected = PICTURE if upright is None else PICTURE.transpose(Image.Transpose(upright))
    difference = np.abs(_pixels(data).astype(int) - np.asarray(expected)).mean()
    assert difference < (6 if kind == "JPEG" else 0.01)


def test_xmp_tells_the_orientation() -> None:
    xmp = b'<x tiff:Orientation="6"/>'
    turned = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    for data in (
        _in_png(_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        _in_webp((b"XMP ", xmp + b" "), flags=4),
    ):
        np.testing.assert_array_equal(_pixels(data), turned)
    assert _pixels(_in_jpeg(_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp))).shape == turned.shape


@pytest.mark.parametrize("kind", ["MPO", "GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_of_several_pictures_is_kept(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _bytes(PICTURE, kind, save_all=True, append_images=[Image.new("RGB", SIZE, "red")], **options)
    assert check_image(data).format in FORMATS
    difference = np.abs(_pixels(data).astype(int) - np.asarray(PICTURE)).mean()
    assert difference < {"MPO": 6, "GIF": 20}.get(kind, 0.01)


DEEP: dict[str, Callable[[], bytes]] = {
    "png 16": lambda: _bytes(Image.fromarray(RAMP.astype(np.uint16))),
    "tiff 16": lambda: _tiff(RAMP.astype(np.uint16), {}),
    "tiff 16 big-endian": lambda: _tiff(RAMP.astype(np.uint16), {}, big=True),
    "tiff 16 inverted": lambda: _tiff(65535 - RAMP.astype(np.uint16), {262: (3, 0)}),
    "tiff 32": lambda: _tiff(RAMP.astype(np.int32), {339: (3, 2)}),
    "12 of 16 bits": lambda: _bytes(Image.fromarray((RAMP // 16).astype(np.uint16))),
    "8 of 16 bits": lambda: _bytes(Image.fromarray((RAMP // 256).astype(np.uint16))),
    "8 of 32 bits": lambda: _tiff((RAMP // 256).astype(np.int32), {339: (3, 2)}),
    "8 of signed 16 bits": lambda: _tiff((RAMP // 256).astype(np.int16), {339: (3, 2)}),
    "float to 1": lambda: _tiff((RAMP / 65535).astype(np.float32), {339: (3, 3)}),
    "float to 1 big-endian": lambda: _tiff((RAMP / 65535).astype(np.float32), {339: (3, 3)}, big=True),
    "float to 255": lambda: _tiff((RAMP / 257).astype(np.float32), {339: (3, 3)}),
    "float to 65535": lambda: _bytes(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float inverted": lambda: _tiff((1 - RAMP / 65535).astype(np.float32), {339: (3, 3), 262: (3, 0)}),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_values_are_scaled(name: str) -> None:
    pixels = _pixels(DEEP[name]())
    assert np.abs(pixels[..., 0].astype(int) - RAMP / 257).max() <= 1
    assert pixels.max() == 255 and pixels.min() == 0


@pytest.mark.parametrize("bits", [1, 255])
def test_masks_of_zero_and_one_are_visible(bits: int) -> None:
    mask = (RAMP > 30_000).astype(np.int32) * bits
    assert set(np.unique(_pixels(_tiff(mask, {339: (3, 2)})))) == {0, 255}


BAD_VALUES = {
    "nan": np.array([[0.5, np.nan]], np.float32),
    "infinite": np.array([[0.5, np.inf]], np.float32),
    "negative": np.array([[-0.1, 0.9]], np.float32),
    "just above one": np.array([[0.0, 1.01]], np.float32),
    "just above 255": np.array([[0.0, 256.0]], np.float32),
    "too large": np.array([[0.0, 70000.0]], np.float32),
    "negative integers": np.array([[-5, 9]], np.int32),
    "large integers": np.array([[0, 1 << 20]], np.int32),
    "signed 16": np.array([[-300, 900]], np.int16),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_without_a_scale_are_refused(name: str) -> None:
    values = BAD_VALUES[name]
    data = _tiff(values, {339: (3, 3 if values.dtype.kind == "f" else 2)})
    for call in (check_image, decode_image):
        with pytest.raises(ImageError, match=r"pixel values from .*; scale them") as caught:
            call(data)
        assert caught.value.reason == "image_values"
    with pytest.raises(ImageError):
        to_rgb(Image.fromarray(values.astype(np.float32 if values.dtype.kind == "f" else np.int32)))


def test_16_bit_colours_are_scaled() -> None:
    deep = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in deep)
    head = struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(lines)) + _chunk(b"IEND", b"")
    assert np.abs(_pixels(png).astype(int) - deep / 257).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = PICTURE.quantize(200)
    np.testing.assert_array_equal(
        _pixels(_bytes(image, transparency=bytes(range(200)))), np.asarray(image.convert("RGB"))
    )
    np.testing.assert_array_equal(_pixels(_bytes(image, "GIF", transparency=7)), np.asarray(image.convert("RGB")))


def test_a_premultiplied_grey_image_is_converted() -> None:
    assert to_rgb(Image.new("La", (4, 4), (40, 255))).getpixel((0, 0)) == (40, 40, 40)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "jpeg 2000": (lambda: _bytes(PICTURE, "JPEG2000"), "image_format"),
    "avif": (lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(99), "image_format"),
    "heif": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "image_format"),
    "ppm": (lambda: _bytes(PICTURE, "PPM"), "image_format"),
    "double": (lambda: _tiff(RAMP, {339: (3, 3)}), "image_format"),
    "jpeg start": (lambda: b"\xff\xd8\xff\xe0\0\x10JFIF", "image_truncated"),
    "png start": (lambda: _bytes(PICTURE)[:30], "image_truncated"),
    "png stream": (lambda: _changed(_bytes(PICTURE), 60), "image_truncated"),
    "png sum": (lambda: _changed(_bytes(PICTURE), 30), "image_truncated"),
    "png palette": (lambda: _bytes(PICTURE.quantize(9)).replace(b"PLTE", b"pLTE"), "image_truncated"),
    "webp": (lambda: _bytes(PICTURE, "WEBP")[:-9], "image_truncated"),
    "tiff start": (lambda: b"II*\0", "image_truncated"),
}


def _changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_cannot_decode_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    for call in (check_image, decode_image):
        with pytest.raises(ImageError) as caught:
            call(make())
        assert caught.value.reason == reason


def test_lack_of_memory_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    with pytest.raises(ImageError) as caught:
        check_image(_bytes(PICTURE))
    assert caught.value.reason == "image_memory"
