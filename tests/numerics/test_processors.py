"""Pixels that transformers makes with the exported processor files, against the released rule."""

from __future__ import annotations

import pytest
import torch
import transformers

from launch.bench.engines.compare_processors import (
    OLD,
    PILLOW,
    SIZES,
    Difference,
    differences,
    exported_processor,
)
from launch.bench.engines.released_pixels import background
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from tests.numerics.native_pair import native_pair, prompt_with_images
from tests.numerics.small_models import MODELS

TORCHVISION = transformers.utils.is_torchvision_available()


def as_released(found: list[Difference], config: ModelConfig) -> list[Difference]:
    """Those with the sides of the released rule, which this release's processor misses for some images."""
    return [item for item in found if item.same_resize and item.side == config.canvas_size]


@pytest.mark.skipif(TORCHVISION and not OLD, reason="transformers 5 resizes with torchvision where it is installed")
def test_one_tower_is_exact_as_exported(report_table) -> None:
    config = load_model_config("1b")
    processor = exported_processor(config, {})
    found = as_released(differences(processor, config, SIZES), config)
    worst = max(item.largest["pixel_values"] for item in found)
    report_table(f"1b, {type(processor).__name__}: {worst:.1g} of 1/255 over {len(found)} sizes, limit 1e-4")
    assert len(found) == len(SIZES) - (1 if OLD else 5) and worst < 1e-4


def test_two_towers_differ_by_eight_bits(report_table) -> None:
    """With Pillow, and with the colour given where the processor does not find it: in the low resolution alone."""
    config = load_model_config("7b")
    processor = exported_processor(config, PILLOW)
    sizes = SIZES[1:7]
    colour = {"background_color": background(config)} if OLD else {}
    found = as_released(differences(processor, config, sizes, **colour), config)
    high = max(item.largest["high_res_pixel_values"] for item in found)
    low = max(item.largest["pixel_values"] for item in found)
    report_table(f"7b, Pillow: high {high:.1g}, low {low:.2g} of 1/255 over {len(found)} sizes")
    assert len(found) == len(sizes) - (1 if OLD else 3) and high < 1e-4 and low <= 1.0


@pytest.mark.skipif(not OLD, reason="transformers 5 finds the colour")
def test_two_towers_without_the_colour_are_off(report_table) -> None:
    """This fault is why the export names the fast class."""
    config = load_model_config("7b")
    (found,) = differences(exported_processor(config, PILLOW), config, [(640, 481)])
    assert found.largest["high_res_pixel_values"] > 10


@pytest.mark.skipif(not TORCHVISION, reason="these image processors need torchvision")
def test_two_towers_are_close_as_exported(report_table) -> None:
    config = load_model_config("7b")
    processor = exported_processor(config, {})
    assert type(processor).__name__ == "DeepseekVLHybridImageProcessor" + ("Fast" if OLD else "")
    found = as_released(differences(processor, config, SIZES[:6]), config)
    peaks = {name: max(item.largest[name] for item in found) for name in found[0].largest}
    report_table(f"7b, torchvision: {peaks} of 1/255 over {len(found)} sizes")
    assert peaks["high_res_pixel_values"] < (2.01 if OLD else 5.01) and peaks["pixel_values"] < 1.5


def test_a_finished_square_passes_every_processor(report_table) -> None:
    for preset, limit in (("1b", 1e-4), ("7b", 1.0)):
        config = load_model_config(preset)
        found = differences(exported_processor(config, {}), config, SIZES[3:8], squared=True)
        worst = {name: max(item.largest[name] for item in found) for name in found[0].largest}
        report_table(f"{preset}, squares given: {', '.join(f'{n} {v:.2g}' for n, v in worst.items())} of 1/255")
        assert all(item.side == config.canvas_size for item in found)
        assert worst.pop("high_res_pixel_values", 0.0) < 1e-4 and worst["pixel_values"] <= limit


@pytest.mark.parametrize("name", ["tiny-hybrid", "tiny-siglip"])
@torch.no_grad()
def test_the_model_refuses_a_smaller_square(name: str) -> None:
    config = MODELS[name]
    with native_pair(config) as pair:
        prompt = prompt_with_images(config, [(40, 30)])
        short = {key: pixels[..., :-1, :-1] for key, pixels in prompt.pixels.items()}
        with pytest.raises((ValueError, RuntimeError), match="size|dimension"):
            pair.theirs(input_ids=torch.tensor([prompt.ids]), **short)
