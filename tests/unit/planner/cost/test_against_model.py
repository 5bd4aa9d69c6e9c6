"""Parameters, FLOPs and saved activations of the vision side equal those of the modules."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_BY_STAGE
from megavl.model import sam
from megavl.model.trainable import part_of
from megavl.model.vision import VisionEncoder
from megavl.planner.cost.blocks import vision_blocks
from megavl.planner.cost.flops import train_flops
from tests.unit.planner.recipes import parameter_counts

SETS = {
    "stage 2": TRAINABLE_BY_STAGE[2],
    "stage 3": TRAINABLE_BY_STAGE[3],
    "siglip only": ("siglip",),
    "sam neck": ("sam_neck", "adaptor"),
    "released code": ("adaptor", "sam_downsamples", "sam_hd", "sam_neck"),
    "all": ("adaptor", "sam_downsamples", "sam_hd", "sam_neck", "sam_trunk", "siglip"),
}


def encoder(preset: str, train: tuple[str, ...]) -> VisionEncoder:
    module = VisionEncoder(load_model_config(preset))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(part_of(f"vision.{name}") in train)
    return module


def canvases(preset: str, images: int) -> torch.Tensor:
    side = load_model_config(preset).canvas_size
    return torch.zeros(images, 3, side, side, dtype=torch.uint8)


def bias_flops(train: tuple[str, ...]) -> int:
    """The relative-position bias of tiny-hybrid, which the planner leaves out: each query with a row and a column."""
    sam = load_model_config("tiny-hybrid").sam
    assert sam is not None
    side, window, whole = sam.image_size // sam.patch_size, sam.window_size, len(sam.global_attn_indexes)
    windowed = (sam.depth - whole) * math.ceil(side / window) ** 2 * window**3
    forward = 2 * 2 * sam.width * (windowed + whole * side**3)
    return forward * (3 if "sam_trunk" in train else 1)


@pytest.mark.parametrize("preset", ["1b", "7b", "tiny-hybrid", "tiny-siglip"])
def test_parameters_equal_the_modules(preset: str) -> None:
    counts = dict.fromkeys(parameter_counts(load_model_config(preset)), 0)
    with torch.device("meta"):
        module = VisionEncoder(load_model_config(preset))
    for name, parameter in module.named_parameters():
        counts[part_of(f"vision.{name}")] += parameter.numel()
    planned = parameter_counts(load_model_config(preset))
    assert {**counts, "llm": planned["llm"]} == planned


@pytest.mark.parametrize("train", SETS.values(), ids=SETS)
def test_forward_and_backward_flops_equal_the_modules(train: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU's way for frozen towers too, which is what the formula counts.
    monkeypatch.setattr(sam, "_by_rows", sam._folded)
    module, images = encoder("tiny-hybrid", train), canvases("tiny-hybrid", 1)
    # The unfused kernel, because fused backward kernels repeat the scores, which is no part of the formula.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(images).sum().backward()
    blocks = vision_blocks(load_model_config("tiny-hybrid"))
    # Like attention, the overhead multiplies activations.
    overhead = sum(block.overhead * (3 if block.needs_backward(frozenset(train)) else 1) for block in blocks)
    planned = train_flops(blocks, trainable=frozenset(train)) + overhead
    assert planned + bias_flops(train) == counter.get_total_flops()


@pytest.mark.parametrize("train", SETS.values(), ids=SETS)
def test_saved_activations_are_near_what_autograd_keeps(train: tuple[str, ...]) -> None:
    """Measured difference in fp32: at most 5%."""
    module, images = encoder("tiny-hybrid", train), canvases("tiny-hybrid", 4)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(images)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    blocks = vision_blocks(load_model_config("tiny-hybrid"))
    planned = 4 * 4 * sum(block.saved for block in blocks if block.needs_backward(frozenset(train)))
    print(f"saved activations: planned {planned:,} bytes, measured {measured:,} ({planned / measured - 1:+.1%})")
    assert planned == pytest.approx(measured, rel=0.1)
