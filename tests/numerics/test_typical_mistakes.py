"""The parity check sees typical mistakes of an implementation, made on purpose in MegaVL's model.

Most of them run and train without an error, so only a comparison in fp32 with a tight tolerance shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from launch.bench.engines.random_models import relative_error
from megavl.config.presets import CLIP_MEAN, CLIP_STD, ImageGeometry
from megavl.data import image
from megavl.model import sam, vision
from tests.numerics.native_pair import TOLERANCE, Pair, Prompt, native_pair, prompt_with_images
from tests.numerics.small_models import MODELS

Mistake = Callable[[Pair, pytest.MonkeyPatch], ImageGeometry | None]
"""Changes MegaVL's side; returns an image geometry where that is the change."""


class Functional:
    """torch.nn.functional as one module sees it, with some functions replaced."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def put(patch: pytest.MonkeyPatch, module: nn.Module, name: str, value: Any) -> None:
    """Replace a parameter, buffer or child. These are no attributes, so undoing `setattr` would delete them."""
    registry = next(r for r in (module._parameters, module._buffers, module._modules) if name in r)
    patch.setitem(registry, name, value)


def siglip_tanh_gelu(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    for block in pair.ours.vision.siglip.blocks:
        mlp = block.mlp
        patch.setattr(mlp, "forward", lambda x, mlp=mlp: mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))


def sam_tanh_gelu(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    for block in pair.ours.vision.sam.blocks:
        mlp = block.mlp
        patch.setattr(mlp, "forward", lambda x, mlp=mlp: mlp.lin2(F.gelu(mlp.lin1(x), approximate="tanh")))


def adaptor_tanh_gelu(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    found = [module for module in pair.ours.vision.adaptor.modules() if isinstance(module, nn.GELU)]
    assert found
    for module in found:
        patch.setattr(module, "approximate", "tanh")


def _low_resolution(change: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]) -> Mistake:
    def apply(pair: Pair, patch: pytest.MonkeyPatch) -> None:
        def interpolate(x: torch.Tensor, *, size: tuple[int, int], antialias: bool, **_: Any) -> torch.Tensor:
            assert antialias
            return change(x, size)

        patch.setattr(vision, "F", Functional(interpolate=interpolate))

    return apply


def _bilinear(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _upsampling(**changes: Any) -> Mistake:
    def apply(pair: Pair, patch: pytest.MonkeyPatch) -> None:
        def interpolate(x: torch.Tensor, **options: Any) -> torch.Tensor:
            return F.interpolate(x, **(options | changes))

        patch.setattr(sam, "F", Functional(interpolate=interpolate))

    return apply


def hd_from_another_block(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    later = pair.config.sam.global_attn_indexes[1]
    assert pair.ours.vision.sam.hd_block not in (later, len(pair.ours.vision.sam.blocks) - 1)
    patch.setattr(pair.ours.vision.sam, "hd_block", later)


def hd_before_the_block(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pair.ours.vision.sam, "hd_block", pair.ours.vision.sam.hd_block - 1)


def hd_scalar_zero(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    put(patch, pair.ours.vision.sam, "hd_alpha_downsamples", nn.Parameter(torch.zeros(1)))


def neck_hd_is_neck(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    put(patch, pair.ours.vision.sam, "neck_hd", pair.ours.vision.sam.neck)


def low_with_clip_values(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    tower = pair.ours.vision.siglip
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    forward = tower.forward
    patch.setattr(tower, "forward", lambda pixels: forward((pixels * 0.5 + 0.5 - mean) / std))


def high_with_half(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    for name in ("clip_mean", "clip_std"):
        put(patch, pair.ours.vision, name, torch.full((1, 3, 1, 1), 0.5))


def no_relative_position(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    for block in pair.ours.vision.sam.blocks:
        for name in ("rel_pos_h", "rel_pos_w"):
            put(patch, block.attn, name, nn.Parameter(torch.zeros_like(getattr(block.attn, name))))


def relative_position_axes_swapped(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    for block in pair.ours.vision.sam.blocks:
        height, width = block.attn.rel_pos_h, block.attn.rel_pos_w
        put(patch, block.attn, "rel_pos_h", width)
        put(patch, block.attn, "rel_pos_w", height)


def relative_position_of_scaled_q(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    for block in pair.ours.vision.sam.blocks:
        scale = (pair.config.sam.width // pair.config.sam.heads) ** -0.5
        for name in ("rel_pos_h", "rel_pos_w"):
            put(patch, block.attn, name, nn.Parameter(getattr(block.attn, name) * scale))


def larger_window(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    window = pair.config.sam.window_size + 2
    for block in pair.ours.vision.sam.blocks:
        if block.window:
            patch.setattr(block, "window", window)
            for name in ("rel_pos_h", "rel_pos_w"):
                # As the released code fits a table to another grid.
                table = getattr(block.attn, name).T[None]
                fitted = F.interpolate(table, size=2 * window - 1, mode="linear")[0].T
                put(patch, block.attn, name, nn.Parameter(fitted.contiguous()))


def window_padding_at_the_top_left(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    def flipped(x: torch.Tensor) -> torch.Tensor:
        return x.flip(1, 2)

    split, join = sam.split_windows, sam.join_windows
    patch.setattr(sam, "split_windows", lambda x, window: flipped(split(flipped(x), window)))
    patch.setattr(sam, "join_windows", lambda x, window, *, grid: flipped(join(flipped(x), window, grid=grid)))


def sides_rounded(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    # Shadows the built-in in that module: the released rule truncates.
    patch.setattr(image, "int", round, raising=False)


def background_127(pair: Pair, patch: pytest.MonkeyPatch) -> ImageGeometry:
    return replace(pair.config.image_geometry, background=(127, 127, 127))


def no_final_siglip_norm(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    put(patch, pair.ours.vision.siglip, "norm", nn.Identity())


def low_before_high(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    # Swapping the halves of the joined channels and swapping the columns that read them is the same.
    second = pair.ours.vision.adaptor.get_submodule("layers.1")
    low, high = second.weight.chunk(2, dim=1)
    put(patch, second, "weight", nn.Parameter(torch.cat([high, low], dim=1)))


MISTAKES: dict[str, tuple[str, Mistake]] = {
    "SigLIP GELU tanh": ("7.3e-5", siglip_tanh_gelu),
    "adaptor GELU tanh": ("1.3e-4", adaptor_tanh_gelu),
    "SAM GELU tanh": ("", sam_tanh_gelu),
    "low-res rounded to uint8": ("1.6e-3", _low_resolution(lambda x, size: (_bilinear(x, size) * 255).round() / 255)),
    "low-res bicubic": (
        "4.7e-3",
        _low_resolution(lambda x, size: F.interpolate(x, size=size, mode="bicubic", antialias=True)),
    ),
    "low-res without antialias": (
        "8.4e-3",
        _low_resolution(lambda x, size: F.interpolate(x, size=size, mode="bilinear")),
    ),
    "interpolation align_corners true": ("7.1e-2", _upsampling(align_corners=True)),
    "interpolation bicubic": ("0.11", _upsampling(mode="bicubic")),
    "HD branch from another block": ("0.20", hd_from_another_block),
    "HD branch before the first global block": ("", hd_before_the_block),
    "HD scalar 0": ("0.31", hd_scalar_zero),
    "neck_hd := neck": ("0.31", neck_hd_is_neck),
    "low-res normalised with CLIP values": ("0.34", low_with_clip_values),
    "no relative position": ("0.37", no_relative_position),
    "relative position: axes swapped": ("", relative_position_axes_swapped),
    "relative position: of the scaled q": ("", relative_position_of_scaled_q),
    "window 2 larger": ("0.47", larger_window),
    "window padding at the top left": ("", window_padding_at_the_top_left),
    "high-res normalised with 0.5": ("0.63", high_with_half),
    "sides rounded, not truncated": ("5.6e-2", sides_rounded),
    "padding colour 127": ("0.74", background_127),
    "no final SigLIP LayerNorm": ("0.83", no_final_siglip_norm),
    "concat order [LOW, HIGH]": ("1.3", low_before_high),
}
"""Each with the change of the logits in another small model of this topology, where it was measured."""


@pytest.fixture(scope="module")
def compared() -> Iterator[tuple[Pair, Prompt, torch.Tensor]]:
    """Two models with the same weights, a prompt with two padded images, and the reference's logits for it."""
    config = MODELS["grid 16 window 7"]
    with torch.no_grad(), native_pair(config) as pair:
        prompt = prompt_with_images(config, [(640, 481), (90, 200)])
        yield pair, prompt, pair.their_logits(prompt)


@torch.no_grad()
def test_without_a_mistake(compared, report_table) -> None:
    pair, prompt, expected = compared
    error = relative_error(pair.our_logits(prompt), expected)
    report_table(f"logits without a mistake: {error:.1e}, limit {TOLERANCE:.0e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("name", MISTAKES)
@torch.no_grad()
def test_mistake_is_seen(name: str, compared, monkeypatch, report_table) -> None:
    pair, prompt, expected = compared
    elsewhere, mistake = MISTAKES[name]
    geometry = mistake(pair, monkeypatch)
    error = relative_error(pair.our_logits(prompt, geometry=geometry), expected)
    report_table(f"{name}: logits change by {error:.1e}" + (f" ({elsewhere} in another model)" if elsewhere else ""))
    assert error > TOLERANCE


@torch.no_grad()
def test_mistakes_leave_no_trace(compared) -> None:
    pair, prompt, expected = compared
    before = pair.our_logits(prompt)
    for _, mistake in MISTAKES.values():
        with pytest.MonkeyPatch.context() as patch:
            mistake(pair, patch)
    assert torch.equal(pair.our_logits(prompt), before)
    assert relative_error(before, expected) < TOLERANCE
