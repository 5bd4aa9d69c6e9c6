"""Compares the pixels of transformers' image processors, configured by exported files, with the released rule.

Works with transformers 4.57 and 5.x, with torchvision or without. Prints one Markdown row for each processor.

    python -m launch.bench.engines.compare_processors [--presets 1b 7b] [--sizes 60]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from PIL import Image

from launch.bench.engines.released_pixels import CLIP_STD, HALF, background, random_picture, square, tower_pixels
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.convert.native_format import side_files
from megavl.convert.tokenizer_files import TokenizerIds

SIZES = (
    *((640, 640), (800, 600), (1024, 768), (517, 301), (640, 481), (1000, 333), (1999, 1333), (333, 1000)),
    *((4, 400), (31, 17), (49, 49), (47, 30), (7, 7), (98, 60)),
)
"""Width and height."""
SPREADS = {"pixel_values": HALF, "high_res_pixel_values": CLIP_STD}
OLD = transformers.__version__.startswith("4.")
"""Whether this is transformers 4.57, which has slow and fast processors."""
PILLOW: dict[str, Any] = {"use_fast": False} if OLD else {"backend": "pil"}
"""Options of the processor that resizes with Pillow, as the released client does."""


@dataclass(frozen=True)
class Difference:
    """Largest differences for one image size, in units of 1/255, by name of the pixel tensor."""

    size: tuple[int, int]
    side: int
    """Side of the square that the processor makes; a model takes one side only."""
    same_resize: bool
    """Whether the image inside the square has the sides of the released rule."""
    largest: dict[str, float]


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["1b", "7b"], choices=["1b", "7b"])
    parser.add_argument("--sizes", type=int, default=60, help="random sizes in addition to the fixed ones")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    sizes = [*SIZES, *(tuple(generator.integers(60, 2100, 2).tolist()) for _ in range(arguments.sizes))]
    print("| model, transformers, processor | sizes | refused | other sides | their pixels | pixels with equal sides |")
    print("|---|---|---|---|---|---|")
    for preset in arguments.presets:
        config = load_model_config(preset)
        for name, options in choices():
            processor = exported_processor(config, options)
            print(row(f"{preset}, {transformers.__version__}, {name}", differences(processor, config, sizes), config))
        processor = exported_processor(config, {})
        found = differences(processor, config, sizes, squared=True)
        print(row(f"{preset}, {transformers.__version__}, as exported, given squares", found, config), flush=True)
    return 0


def row(name: str, found: Sequence[Difference], config: ModelConfig) -> str:
    """One line of the table."""
    refused = [item for item in found if item.side != config.canvas_size]
    rest = [item for item in found if item not in refused]
    equal, other = ([item for item in rest if item.same_resize == wanted] for wanted in (True, False))
    cells = [name, len(found), len(refused), len(other), worst(other), worst(equal)]
    return "| " + " | ".join(map(str, cells)) + " |"


def worst(found: Sequence[Difference]) -> str:
    """Largest difference of each pixel tensor, its median over the sizes, and the size that showed it."""
    cells = []
    for name in found[0].largest if found else ():
        title = {"pixel_values": "low ", "high_res_pixel_values": "high "}[name] if len(found[0].largest) > 1 else ""
        values = sorted((item.largest[name], item.size) for item in found)
        (peak, size), middle = values[-1], values[len(values) // 2][0]
        cells.append(f"{title}{peak:.2g} (median {middle:.2g})" + (f" at {size[0]} x {size[1]}" if peak > 2 else ""))
    return ", ".join(cells) or "-"


def choices() -> list[tuple[str, dict[str, Any]]]:
    """Options that a user can give, by name; the first is none."""
    torchvision = {"use_fast": True} if OLD else {"backend": "torchvision"}
    named = {("slow" if OLD else "PIL"): PILLOW}
    if transformers.utils.is_torchvision_available():
        named["fast" if OLD else "torchvision"] = torchvision
    return [("as exported", {}), *named.items()]


def exported_processor(config: ModelConfig, options: dict[str, Any]) -> Any:
    """The processor that MegaVL's export names."""
    ids = TokenizerIds(bos=100000, eos=100001, pad=100001, image=100015)
    files = side_files(config, ids=ids, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
            (Path(folder) / name).write_text(json.dumps(files[name]), encoding="utf-8")
        return transformers.AutoImageProcessor.from_pretrained(folder, **options)


def differences(
    processor: Any, config: ModelConfig, sizes: Sequence[tuple[int, int]], *, squared: bool = False, **call: Any
) -> list[Difference]:
    """One image of each size through the processor.

    Args:
        sizes: width and height.
        squared: give the processor the finished square instead of the image.
    """
    found = []
    for number, size in enumerate(sizes):
        picture = random_picture(number, size)
        expected = tower_pixels([picture], config)
        given = square(picture, size=config.canvas_size, background=background(config)) if squared else picture
        pixels = processor(images=[given], return_tensors="pt", **call)
        canvas_name = "pixel_values" if config.sam is None else "high_res_pixel_values"
        side, largest = pixels[canvas_name].shape[-1], {}
        if pixels[canvas_name].shape == expected[canvas_name].shape:
            for name, value in expected.items():
                spread = torch.tensor(SPREADS[name]).view(1, 3, 1, 1)
                largest[name] = float(((pixels[name].float() - value) * spread * 255).abs().max())
        found.append(Difference(size, side, squared or same_resize(processor, picture, config), largest))
    return found


def same_resize(processor: Any, picture: Image.Image, config: ModelConfig) -> bool:
    """Whether transformers' arithmetic of this version gives the sides of the released rule."""
    size, longest = config.canvas_size, max(picture.size)
    whole = int if OLD else round
    return all(max(whole(side * (size / longest)), 14) == max(int(side / longest * size), 14) for side in picture.size)


if __name__ == "__main__":
    sys.exit(main())
