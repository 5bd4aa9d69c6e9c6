"""Every kind of adaptor against its row of the table, written out patch by patch; its cost against what runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu
from torch.utils.flop_counter import FlopCounterMode

from launch.bench.engines.random_models import random_weights
from megavl.config.adaptor import ADAPTORS
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.model.adaptor import build_adaptor
from megavl.model.vision import VisionEncoder
from megavl.planner.cost.blocks import Block, vision_blocks
from megavl.weights.canonical_names import canonical_shapes
from tests.unit.planner.recipes import parameter_counts

CASES = [(kind, depth) for kind, row in ADAPTORS.items() for depth in ((1,) if row.one_layer else (1, 2, 3))]
TOLERANCE = 1e-14
IMAGES = 2

Weights = Mapping[str, torch.Tensor]


def config_of(kind: str, depth: int) -> ModelConfig:
    """The tiny model with that adaptor; its grid is 6, because token pooling needs an even one."""
    adaptor = {"kind": kind, "depth": depth}
    if ADAPTORS[kind].both_towers:
        return load_model_config("tiny-hybrid", siglip={"image_size": 96}, sam={"image_size": 256}, adaptor=adaptor)
    return load_model_config("tiny-siglip", siglip={"image_size": 96}, adaptor=adaptor)


def apply(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oc,...c->...o", weights[f"{name}.weight"], x) + weights[f"{name}.bias"]


def rest(weights: Weights, prefix: str, first: int, depth: int, x: torch.Tensor) -> torch.Tensor:
    """(depth - 1) x [GELU, Linear], the layers numbered from `first` in steps of two."""
    for number in range(depth - 1):
        x = apply(weights, f"{prefix}.{first + 2 * number}", gelu(x, approximate="none"))
    return x


def linear(w: Weights, depth: int, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return apply(w, "layers", low)


def mlp_gelu(w: Weights, depth: int, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return rest(w, "layers", 2, depth, apply(w, "layers.0", low))


def shared_linear(w: Weights, depth: int, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return apply(w, "layers", torch.cat([high, low], -1))


def shared_mlp(w: Weights, depth: int, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return rest(w, "layers", 2, depth, apply(w, "layers.0", torch.cat([high, low], -1)))


def hybrid(w: Weights, depth: int, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    halves = [apply(w, "high_up_proj", high), apply(w, "low_up_proj", low)]
    return rest(w, "layers", 1, depth, torch.cat(halves, -1))


def separate_mlp(w: Weights, depth: int, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    towers = {"high_layers": high, "low_layers": low}
    return torch.cat([rest(w, name, 2, depth, apply(w, f"{name}.0", x)) for name, x in towers.items()], -1)


def pooled(pairs: Callable[[int], list[tuple[int, int]]]) -> Callable[..., torch.Tensor]:
    def reference(w: Weights, depth: int, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        grid = int(low.shape[1] ** 0.5)
        positions = [
            apply(w, name, torch.cat([x[:, a], x[:, b]], -1))
            for name, x in (("high_up_proj", high), ("low_up_proj", low))
            for a, b in pairs(grid)
        ]
        return rest(w, "layers", 1, depth, torch.stack(positions, 1))

    return reference


def columns(grid: int) -> list[tuple[int, int]]:
    """Patch numbers, row by row, of the left and the right one of each pair of a row."""
    return [(row * grid + col, row * grid + col + 1) for row in range(grid) for col in range(0, grid, 2)]


def rows(grid: int) -> list[tuple[int, int]]:
    """Patch numbers of the upper and the lower one of each pair of a column."""
    return [(row * grid + col, (row + 1) * grid + col) for row in range(0, grid, 2) for col in range(grid)]


REFERENCES: dict[str, Callable[..., torch.Tensor]] = {
    "linear": linear,
    "mlp_gelu": mlp_gelu,
    "low_high_hybrid_split_mlp_gelu": hybrid,
    "shared_linear": shared_linear,
    "shared_mlp": shared_mlp,
    "separate_mlp": separate_mlp,
    "token_pooling_width": pooled(columns),
    "token_pooling_height": pooled(rows),
}


def features(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """HIGH and LOW, fp64."""
    generator = torch.Generator().manual_seed(5)
    shape = (IMAGES, config.siglip.grid**2, config.siglip.width)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def blocks_of(config: ModelConfig) -> list[Block]:
    return [block for block in vision_blocks(config) if block.part == "adaptor"]


@pytest.mark.parametrize(("kind", "depth"), CASES)
def test_forward_equals_the_table(kind: str, depth: int, report_table: Any) -> None:
    config = config_of(kind, depth)
    prefix = "vision.adaptor."
    weights = {
        name.removeprefix(prefix): tensor.double() for name, tensor in random_weights(config) if name.startswith(prefix)
    }
    adaptor = build_adaptor(config).double()
    adaptor.load_state_dict(weights)
    high, low = features(config)
    expected = REFERENCES[kind](weights, depth, high, low)
    found = adaptor(low, high).detach()
    assert found.shape == expected.shape == (IMAGES, config.image_tokens, config.llm.hidden_size)
    error = float((found - expected).abs().max() / expected.abs().max())
    report_table((kind, f"depth {depth}", error, f"(relative, fp64; tolerance {TOLERANCE:.0e})"))
    assert error <= TOLERANCE


@pytest.mark.parametrize(("kind", "depth"), [case for case in CASES if case[1] == 2 or ADAPTORS[case[0]].one_layer])
def test_gradient_reaches_every_weight_of_the_encoder(kind: str, depth: int) -> None:
    config = config_of(kind, depth)
    encoder = VisionEncoder(config)
    weights = dict(random_weights(config))
    encoder.load_state_dict({name: weights[f"vision.{name}"] for name in encoder.state_dict()})
    generator = torch.Generator().manual_seed(6)
    side = config.canvas_size
    canvases = torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
    out = encoder(canvases)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    without = [name for name, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


@pytest.mark.parametrize(("kind", "depth"), CASES)
def test_names_shapes_and_counts_follow_the_tables(kind: str, depth: int) -> None:
    config = config_of(kind, depth)
    with torch.device("meta"):
        built = {f"vision.{name}": tuple(weight.shape) for name, weight in VisionEncoder(config).named_parameters()}
    assert built == {name: shape for name, shape in canonical_shapes(config).items() if name.startswith("vision.")}
    counted = sum(weight.numel() for weight in build_adaptor(config).parameters())
    assert parameter_counts(config)["adaptor"] == counted


@pytest.mark.parametrize(("kind", "depth"), CASES)
def test_planned_cost_equals_the_real_cost(kind: str, depth: int) -> None:
    """FLOPs forward and backward with everything trained, and what autograd keeps of the adaptor's inside."""
    config = config_of(kind, depth)
    adaptor, blocks = build_adaptor(config).double(), blocks_of(config)
    high, low = (tensor.requires_grad_() for tensor in features(config))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.data_ptr() for weight in adaptor.parameters()}
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        adaptor(low, high).sum().backward()
    everything = frozenset({"siglip", "sam_trunk", "adaptor"})
    planned = IMAGES * sum(block.forward + block.backward(everything) for block in blocks)
    assert planned == counter.get_total_flops()
    assert IMAGES * 8 * sum(block.saved for block in blocks) == sum(kept.values())


@pytest.mark.parametrize("kind", ADAPTORS)
def test_planner_counts_input_gradients_above_trained_towers(kind: str) -> None:
    config = config_of(kind, 1)
    first = [layer for layer in config.adaptor_layers if layer.first]
    for layer, block in zip(first, blocks_of(config)):
        assert block.needs_backward(frozenset({"siglip"})) == ("low" in layer.towers)
        assert block.needs_backward(frozenset({"sam_neck"})) == ("high" in layer.towers)
    assert {tower for layer in first for tower in layer.towers} == (
        {"high", "low"} if ADAPTORS[kind].both_towers else {"low"}
    )


def test_parameters_at_the_size_of_the_7b() -> None:
    counts = {
        kind: parameter_counts(load_model_config("7b", adaptor={"kind": kind}))["adaptor"]
        for kind, row in ADAPTORS.items()
        if row.both_towers and not row.one_layer
    }
    first, second = 2048 * 4096 + 4096, 4096 * 4096 + 4096
    assert counts == {
        "low_high_hybrid_split_mlp_gelu": 20_979_712,
        "shared_mlp": first + second,
        "separate_mlp": 2 * (1024 * 2048 + 2048 + 2048 * 2048 + 2048),
        "token_pooling_width": 2 * first + second,
        "token_pooling_height": 2 * first + second,
    }
