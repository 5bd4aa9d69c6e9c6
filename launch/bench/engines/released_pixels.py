"""The released image rule, written independently of `megavl.data` and `megavl.model` so that both can be compared.

Source: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/models/image_processing_vlm.py:127-162` (resize, square) and
`deepseek_vl/models/clip_encoder.py` (normalisation and low resolution of the hybrid towers).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from megavl.config.model import ModelConfig

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def square(image: Image.Image, *, size: int, background: tuple[int, int, int]) -> Image.Image:
    """Resize to `size` on the long side, then center on a square of the background colour."""
    width, height = image.size
    longest = max(width, height)
    target = (max(int(width / longest * size), 14), max(int(height / longest * size), 14))
    resized = image.resize(target, Image.Resampling.BICUBIC)
    if target[0] == target[1]:
        return resized
    side = max(target)
    result = Image.new("RGB", (side, side), background)
    offset = (0, (side - target[1]) // 2) if target[0] > target[1] else ((side - target[0]) // 2, 0)
    result.paste(resized, offset)
    return result


def background(config: ModelConfig) -> tuple[int, int, int]:
    """Padding colour: the mean that the processor was given."""
    red, green, blue = (int(value * 255) for value in (HALF if config.sam is None else CLIP_MEAN))
    return red, green, blue


def unit_pixels(images: Sequence[Image.Image], config: ModelConfig) -> torch.Tensor:
    """Squares as fp32 (I, 3, C, C) in [0, 1]."""
    size, colour = config.canvas_size, background(config)
    squares = [np.asarray(square(image, size=size, background=colour)) for image in images]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255


def tower_pixels(images: Sequence[Image.Image], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Inputs of the towers, under the argument names of transformers' classes."""
    pixels = unit_pixels(images, config)
    if config.sam is None:
        return {"pixel_values": _normalise(pixels, HALF, HALF)}
    side = config.siglip.image_size
    low = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return {
        "pixel_values": _normalise(low, HALF, HALF),
        "high_res_pixel_values": _normalise(pixels, CLIP_MEAN, CLIP_STD),
    }


def random_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colours with noise, so that filters, colours and the position of each pixel matter."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noise = generator.integers(-60, 61, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(np.int64) + noise, 0, 255).astype(np.uint8))


def _normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
