"""Backgrounds of scenes: drawn surfaces, or crops of images in a folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from megavl.data.image import ImageError, decode_image

Colour = tuple[int, int, int]
Size = tuple[int, int]
"""Width and height in pixels."""


def draw_background(rng: random.Random, size: Size) -> tuple[str, Image.Image]:
    """Draw a random surface; returns its kind and its image."""
    kind = rng.choice(list(_KINDS))
    return kind, _KINDS[kind](rng, size)


def crop_background(rng: random.Random, size: Size, *, path: Path) -> Image.Image:
    """A random crop of an image, which is enlarged if it is too small.

    Raises:
        ImageError: the file cannot be used.
    """
    try:
        image = decode_image(path)
    except ImageError as error:
        raise ImageError(f"--backgrounds {path}: {error}; remove the file", error.reason) from error
    if image.width < size[0] or image.height < size[1]:
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    left, top = rng.randint(0, image.width - size[0]), rng.randint(0, image.height - size[1])
    return image.crop((left, top, left + size[0], top + size[1]))


def random_colour(rng: random.Random) -> Colour:
    """A random RGB colour."""
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def numpy_rng(rng: random.Random) -> np.random.Generator:
    """A numpy generator seeded by a Python one."""
    return np.random.default_rng(rng.getrandbits(64))


def to_image(values: npt.NDArray[np.floating]) -> Image.Image:
    """RGB image of an array (height, width, 3), clipped to 0..255."""
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _plain(rng: random.Random, size: Size) -> Image.Image:
    return Image.new("RGB", size, random_colour(rng))


def _gradient(rng: random.Random, size: Size) -> Image.Image:
    first, last = np.array(random_colour(rng), float), np.array(random_colour(rng), float)
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    share = (x * np.cos(angle) + y * np.sin(angle))[..., None] / 2.83 + 0.5
    return to_image(first * share + last * (1 - share))


def _clouds(rng: random.Random, size: Size) -> Image.Image:
    """Soft patches, like something out of focus."""
    cells = rng.randint(3, 9)
    coarse = numpy_rng(rng).uniform(-1, 1, (cells, cells, 3)) * rng.uniform(15, 70) + np.array(
        random_colour(rng), float
    )
    return to_image(coarse).resize(size, Image.Resampling.BICUBIC)


def _boards(rng: random.Random, size: Size) -> Image.Image:
    """Boards or tiles with joints."""
    image = _plain(rng, size)
    draw = ImageDraw.Draw(image)
    base = image.getpixel((0, 0))
    assert isinstance(base, tuple)
    wide, high = rng.randint(size[0] // 8, size[0]), rng.randint(size[1] // 14, size[1] // 4)
    joint, spread = rng.randint(1, 4), rng.randint(4, 25)
    for row in range(0, size[1], high):
        offset = rng.randint(0, wide)
        for left in range(-offset, size[0], wide):
            red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in base)
            draw.rectangle((left, row, left + wide - joint, row + high - joint), fill=(red, green, blue))
    return image


def _shapes(rng: random.Random, size: Size) -> Image.Image:
    """Overlapping shapes, like a street or a shelf."""
    image = _gradient(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(5, 25)):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        wide, high = rng.uniform(0.05, 0.4) * size[0], rng.uniform(0.05, 0.4) * size[1]
        form = rng.choice((draw.rectangle, draw.ellipse))
        form((x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), fill=random_colour(rng))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 6)))


_KINDS: Mapping[str, Callable[[random.Random, Size], Image.Image]] = {
    "plain": _plain,
    "gradient": _gradient,
    "clouds": _clouds,
    "boards": _boards,
    "shapes": _shapes,
}
