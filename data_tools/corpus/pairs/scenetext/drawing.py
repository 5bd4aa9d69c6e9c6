"""One scene: readable phrases on a background, none covering another.

A readable phrase lies wholly inside the image and its font has at least MIN_FONT_SIZE pixels. Its contrast is at least
MIN_CONTRAST against both the darkest and the brightest part of its background. If no ink reaches that contrast, the
phrase gets a plain plate as its background.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_tools.corpus.pairs.fonts import Face
from data_tools.corpus.pairs.scenetext.background import Colour, Size, numpy_rng, random_colour, to_image
from data_tools.corpus.scripts import is_han

MIN_FONT_SIZE = 18
"""Pixels."""
MIN_CONTRAST = 3.0
"""Ratio of relative luminances; WCAG 2.1 demands 3 for large letters."""
UPRIGHT_SHARE = 0.5
"""Share of phrases that are rotated by a few degrees at most."""
VERTICAL_SHARE = 0.15
"""Share of Chinese phrases that run from top to bottom."""
PLATE_SHARE, SHADOW_SHARE = 0.2, 0.2
"""Share of phrases that get a plate or a shadow, although they are readable without."""
_ATTEMPTS = 25
_GAP = 6
"""Smallest distance of two phrases in pixels."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class DrawnPhrase:
    """A phrase in the image."""

    text: str
    quad: tuple[Point, Point, Point, Point]
    """Corners of its box in pixels, clockwise from the upper left corner of the text."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        xs, ys = zip(*self.quad, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def draw_phrases(rng: random.Random, image: Image.Image, phrases: list[str], *, faces: list[Face]) -> list[DrawnPhrase]:
    """Write as many phrases as fit into an image; returns them in reading order.

    Args:
        rng: decides every choice.
        image: RGB background, modified in place.
        phrases: phrases in the order in which they are tried.
        faces: faces from which each phrase gets one that has all its characters.
    """
    drawn: list[DrawnPhrase] = []
    for phrase in phrases:
        fitting = [face for face in rng.sample(faces, min(len(faces), 8)) if face.covers(phrase)]
        if not fitting:
            continue
        mask = _mask(rng, phrase, fitting[0], size=image.size)
        for _ in range(_ATTEMPTS):
            quad = _quad(rng, mask.size, within=image.size)
            candidate = DrawnPhrase(text=phrase, quad=quad)
            if _inside(candidate, image.size) and not any(_touch(candidate, other) for other in drawn):
                _ink(rng, image, mask, candidate)
                drawn.append(candidate)
                break
    return in_reading_order(drawn)


def degrade(rng: random.Random, image: Image.Image) -> Image.Image:
    """Add uneven light, noise and blur, each weak enough to keep the letters readable."""
    if rng.random() < 0.4:
        x, y = np.meshgrid(np.linspace(-1, 1, image.width), np.linspace(-1, 1, image.height))
        angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.25)
        light = 1 - depth * (0.5 + (x * math.cos(angle) + y * math.sin(angle)) / 2.83)
        image = to_image(np.asarray(image, float) * light[..., None])
    if rng.random() < 0.5:
        values = np.asarray(image, float)
        image = to_image(values + numpy_rng(rng).normal(0, rng.uniform(1, 8), values.shape))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return image


def in_reading_order(drawn: list[DrawnPhrase]) -> list[DrawnPhrase]:
    """Sort phrases by row, then from left to right. Phrases share a row if the middle of one is beside the other."""
    rows: list[list[DrawnPhrase]] = []
    for one in sorted(drawn, key=lambda each: each.bounds[1] + each.bounds[3]):
        middle = (one.bounds[1] + one.bounds[3]) / 2
        if rows and rows[-1][0].bounds[1] < middle < rows[-1][0].bounds[3]:
            rows[-1].append(one)
        else:
            rows.append([one])
    return [one for row in rows for one in sorted(row, key=lambda each: each.bounds[0])]


def _mask(rng: random.Random, phrase: str, face: Face, *, size: Size) -> Image.Image:
    """The phrase as an opacity mask with some padding."""
    high = max(MIN_FONT_SIZE, round(rng.uniform(0.045, 0.14) * min(size)))
    chinese = is_han(phrase[0])
    upright = not chinese or rng.random() >= VERTICAL_SHARE
    room = 0.9 * (size[0] if upright else size[1])
    font = _font(face, high)
    length = font.getlength(phrase) if upright else len(phrase) * high * 1.1
    if length > room:
        high = max(MIN_FONT_SIZE, int(high * room / length))
        font = _font(face, high)
    stroke = rng.choice((0, 0, 0, 1)) if high > 30 else 0
    pad = max(3, high // 6)
    if upright:
        left, top, right, bottom = font.getbbox(phrase, stroke_width=stroke)
        mask = Image.new("L", (math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad))
        ImageDraw.Draw(mask).text((pad - left, pad - top), phrase, font=font, fill=255, stroke_width=stroke)
        return mask
    step = round(high * 1.1)
    mask = Image.new("L", (high + 2 * pad, step * len(phrase) + 2 * pad))
    draw = ImageDraw.Draw(mask)
    for number, character in enumerate(phrase):
        draw.text((pad + high / 2, pad + step * (number + 0.5)), character, font=font, fill=255, anchor="mm")
    return mask


def _font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(face.path, size, index=face.index, layout_engine=ImageFont.Layout.BASIC)


def _quad(rng: random.Random, box: Size, *, within: Size) -> tuple[Point, Point, Point, Point]:
    """Corners of a box: each is moved a little, as by perspective, then the box is rotated and moved into the image."""
    turn = rng.gauss(0, 2) if rng.random() < UPRIGHT_SHARE else rng.uniform(-30, 30)
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    wide, high = box
    lean = rng.uniform(0, 0.14) * min(box)
    corners = ((-wide / 2, -high / 2), (wide / 2, -high / 2), (wide / 2, high / 2), (-wide / 2, high / 2))
    moved = [(x + rng.uniform(-lean, lean), y + rng.uniform(-lean, lean)) for x, y in corners]
    turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in moved]
    reach_x, reach_y = max(abs(x) for x, _ in turned), max(abs(y) for _, y in turned)
    middle_x = rng.uniform(reach_x, max(reach_x, within[0] - reach_x))
    middle_y = rng.uniform(reach_y, max(reach_y, within[1] - reach_y))
    first, second, third, fourth = ((round(x + middle_x, 1), round(y + middle_y, 1)) for x, y in turned)
    return first, second, third, fourth


def _inside(one: DrawnPhrase, size: Size) -> bool:
    left, top, right, bottom = one.bounds
    return left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]


def _touch(one: DrawnPhrase, other: DrawnPhrase) -> bool:
    left, top, right, bottom = one.bounds
    other_left, other_top, other_right, other_bottom = other.bounds
    return (
        left < other_right + _GAP
        and other_left < right + _GAP
        and top < other_bottom + _GAP
        and other_top < bottom + _GAP
    )


def _ink(rng: random.Random, image: Image.Image, mask: Image.Image, phrase: DrawnPhrase) -> None:
    """Write one phrase into the image."""
    left, top, right, bottom = phrase.bounds
    box = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    part = image.crop(box)
    spread = _warp(mask, phrase, box)
    ground = _warp(Image.new("L", mask.size, 255), phrase, box)
    background = np.asarray(part, float)[np.asarray(ground) > 127]
    dark, bright = (float(level) for level in np.percentile(_luminance(background), (5, 95)))
    colour = _readable(rng, dark, bright)
    if colour is None or rng.random() < PLATE_SHARE:
        plate = random_colour(rng)
        level = float(_luminance(np.array([plate], float))[0])
        colour = _readable(rng, level, level)
        part.paste(plate, mask=ground)
    elif rng.random() < SHADOW_SHARE:
        shift = max(1, round(mask.height / 25))
        shadow = spread.transform(part.size, Image.Transform.AFFINE, (1, 0, -shift, 0, 1, -shift))
        part.paste(random_colour(rng), mask=shadow.point(lambda value: value // 3))
    assert colour is not None  # black or white has enough contrast to any single colour
    part.paste(colour, mask=spread)
    image.paste(part, box[:2])


def _readable(rng: random.Random, dark: float, bright: float) -> Colour | None:
    """An ink with enough contrast to both ends of a range of luminances, if there is one."""
    for colour in (*(random_colour(rng) for _ in range(12)), (0, 0, 0), (255, 255, 255)):
        level = float(_luminance(np.array([colour], float))[0])
        if min(contrast(level, dark), contrast(level, bright)) >= MIN_CONTRAST and not dark < level < bright:
            return colour
    return None


def contrast(one: float, other: float) -> float:
    """Ratio of two relative luminances, at least 1 (WCAG 2.1)."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def _luminance(colours: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Relative luminance (N,) of sRGB colours (N, 3) in 0..255."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    levels: npt.NDArray[np.floating] = linear @ np.array([0.2126, 0.7152, 0.0722])
    return levels


def _warp(mask: Image.Image, phrase: DrawnPhrase, box: tuple[int, int, int, int]) -> Image.Image:
    """A mask warped to the corners of a phrase, as seen in a box of the image."""
    wide, high = mask.size
    rows, values = [], []
    for corner, (u, v) in zip(phrase.quad, ((0, 0), (wide, 0), (wide, high), (0, high)), strict=True):
        x, y = corner[0] - box[0], corner[1] - box[1]
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    factors = np.linalg.solve(np.array(rows, float), np.array(values, float))
    size = (box[2] - box[0], box[3] - box[1])
    return mask.transform(size, Image.Transform.PERSPECTIVE, factors.tolist(), Image.Resampling.BICUBIC)
