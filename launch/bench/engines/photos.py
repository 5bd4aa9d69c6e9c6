"""Pictures that compress like photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

QUALITY = 88
"""Of the JPEG files."""


def photo(seed: int, size: tuple[int, int] = (1024, 768)) -> bytes:
    """A JPEG with large soft areas and grain; at 1024 x 768 it has about 200 KB."""
    draw = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    grain = draw.normal(0, 9, (height, width, 1))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + grain
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
