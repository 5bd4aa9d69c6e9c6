"""Layouts against brute force, and their notation against megatron-core's own parser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megavl.config.load import load_model_config
from megavl.planner.cost.blocks import vision_blocks
from megavl.planner.cost.memory import rank_memory
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.layouts.balance import ClosedForm, balance, every_layout
from megavl.planner.layouts.layout import balance_weights, layout_of, layout_string
from megavl.planner.scenario import Kind, Scenario, expected_images, make_scenario, multimodal_share
from megavl.planner.simulation.predict import expected_seconds
from megavl.planner.simulation.times import BlockTimes, DeviceTimes, FlatTimes, Pass, StepExtras, TimeSource
from megavl.weights.canonical_names import canonical_shapes
from tests.unit.planner.recipes import recipe_of


@dataclass(frozen=True)
class GivenTimes(TimeSource):
    """A time source with given block times."""

    layer: Pass
    vision: Pass
    head: Pass
    transfer_s: float = 0.0
    name: str = "given"
    assumptions: tuple[str, ...] = ()

    def blocks(self, scenario: Scenario, kind: Kind) -> BlockTimes:
        vision = self.vision if kind == "multimodal" else Pass()
        return BlockTimes(vision=vision, embedding=Pass(), layer=self.layer, head=self.head)

    def transfer(self, scenario: Scenario) -> float:
        return self.transfer_s

    def extras(self, scenario: Scenario, kind: Kind, *, trained: int, last_backward: float) -> StepExtras:
        return StepExtras()


SECONDS = st.floats(min_value=0.0, max_value=8.0, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 7),
    pipeline=st.integers(2, 4),
    virtual=st.integers(1, 2),
    fraction=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    vision=SECONDS,
    head=SECONDS,
)
def test_small_spaces_give_the_fastest_layout_of_all(
    layers: int, pipeline: int, virtual: int, fraction: float, vision: float, head: float
) -> None:
    virtual = virtual if pipeline == 2 else 1
    recipe = recipe_of(
        layers=layers, fraction=fraction, pipeline=pipeline, virtual_pipeline=virtual, batch=4 * pipeline
    )
    scenario = make_scenario(recipe)
    source = GivenTimes(layer=Pass(1.0, 2.0), vision=Pass(vision, 0.0), head=Pass(head / 2, head))
    found = balance(scenario, source, small_space=10_000)
    best = min(expected_seconds(scenario, other, source) for other in every_layout(layers, scenario.stages))
    assert expected_seconds(scenario, found, source) == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(4, 10),
    pipeline=st.integers(2, 4),
    fraction=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    vision=SECONDS,
    head=SECONDS,
)
@example(layers=4, pipeline=4, fraction=0.0, vision=0.0, head=1.869140625)
def test_the_guided_search_finds_it_too(
    layers: int, pipeline: int, fraction: float, vision: float, head: float
) -> None:
    """The space is too large to try everything; the result is within 1% of the best."""
    recipe = recipe_of(layers=layers, fraction=fraction, pipeline=pipeline, batch=6 * pipeline)
    scenario = make_scenario(recipe)
    source = GivenTimes(layer=Pass(1.0, 2.0), vision=Pass(vision, 0.0), head=Pass(head / 2, head))
    found = balance(scenario, source, small_space=0)
    best = min(expected_seconds(scenario, other, source) for other in every_layout(layers, pipeline))
    assert expected_seconds(scenario, found, source) <= 1.01 * best


def test_equal_stages_get_equal_layers() -> None:
    source = GivenTimes(layer=Pass(1.0, 2.0), vision=Pass(), head=Pass())
    for sizes in ({"pipeline": 8}, {"pipeline": 4, "virtual_pipeline": 2}):
        scenario = make_scenario(recipe_of(layers=32, fraction=0.0, batch=64, **sizes))
        assert balance(scenario, source) == (4,) * 8


def test_a_heavy_first_stage_gets_no_layers() -> None:
    scenario = make_scenario(recipe_of(layers=6, fraction=1.0, pipeline=3))
    source = GivenTimes(layer=Pass(1.0, 2.0), vision=Pass(27.0, 0.0), head=Pass())
    assert balance(scenario, source)[0] == 0


def test_mixture_decides_layers_of_the_first_stage() -> None:
    """If most steps are text, moving layers off the first stage slows the run down."""
    source = GivenTimes(layer=Pass(1.0, 2.0), vision=Pass(9.0, 0.0), head=Pass())
    first = [
        balance(make_scenario(recipe_of(layers=16, fraction=fraction, pipeline=4)), source)[0]
        for fraction in (0.0, 0.3, 0.7, 1.0)
    ]
    assert first[0] == 4
    assert first == sorted(first, reverse=True)
    assert first[-1] < first[0]


def test_warmup_lowers_the_share_of_multimodal_steps() -> None:
    """A linear warm-up from 0 over w steps counts as (w - 1) / 2 steps at the full share."""
    assert multimodal_share(recipe_of(fraction=0.3, steps=100)) == pytest.approx(0.3)
    assert multimodal_share(recipe_of(fraction=0.3, steps=100, warmup=50)) == pytest.approx(0.3 * (24.5 + 50) / 100)
    assert multimodal_share(recipe_of(fraction=0.3, steps=10, warmup=40)) == pytest.approx(0.3 * 45 / 40 / 10)


def test_layers_go_where_memory_is() -> None:
    """The first rank holds most micro-batches in flight, so a tight limit moves its layers to later ranks."""
    scenario = make_scenario(recipe_of(fraction=0.0, pipeline=4, train=("llm",)))
    free = balance(scenario, FlatTimes())
    sizes = [rank_memory(scenario, rank, free).total for rank in range(4)]
    assert sizes[0] == max(sizes)
    limit = sizes[0] - 1
    tight = balance(scenario, FlatTimes(), memory_bytes=limit)
    assert tight[0] < free[0]
    assert all(rank_memory(scenario, rank, tight).total <= limit for rank in range(4))


def test_closed_form_is_exact_for_equal_stages() -> None:
    scenario = make_scenario(recipe_of(layers=8, fraction=0.0, pipeline=4, virtual_pipeline=2, batch=16))
    source = GivenTimes(layer=Pass(1.0, 2.0), vision=Pass(), head=Pass())
    assert ClosedForm(scenario, source).seconds((1,) * 8) == pytest.approx(16 * 6 + 3 * 6 / 2)
    assert ClosedForm(scenario, source).seconds((1,) * 8) == pytest.approx(expected_seconds(scenario, (1,) * 8, source))


def test_encoder_load_equals_the_published_share() -> None:
    """Published: 5 images add 64% to stage 0 at TP4 PP4 when every tensor-parallel rank repeats the encoders."""
    scenario = make_scenario(recipe_of(train=("llm",), tensor=4, pipeline=4))
    times = FlatTimes().blocks(scenario, "multimodal")
    # The published share counts the head at every position, as on a text step.
    stage = (30 * times.layer.total + FlatTimes().blocks(scenario, "text").head.total) / 4
    blocks = [block for block in vision_blocks(scenario.recipe.model) if block.part != "adaptor"]
    assert 5 * sum(block.forward for block in blocks) / stage == pytest.approx(0.64, abs=0.005)
    assert times.vision.forward == 5 * sum(b.forward + b.overhead for b in vision_blocks(scenario.recipe.model))


def test_assumed_images_fit_the_sequence() -> None:
    assert expected_images(recipe_of()) == 5
    assert expected_images(recipe_of(fraction=0.0)) == 0


def test_resolve_keeps_a_given_layout() -> None:
    given_layout = (1, 9, 10, 10)
    assert layout_of(make_scenario(recipe_of(pipeline=4, layout=given_layout)), FlatTimes()) == given_layout
    assert layout_of(make_scenario(recipe_of()), FlatTimes()) == (30,)
    scenario = make_scenario(recipe_of(pipeline=4, virtual_pipeline=2), devices=8)
    found = layout_of(scenario, DeviceTimes(device=DEVICES["a100"]))
    assert (len(found), sum(found)) == (8, 30)


def test_large_pipelines_are_balanced_at_once() -> None:
    scenario = make_scenario(recipe_of(layers=120, pipeline=16, virtual_pipeline=2, batch=64), devices=16)
    found = balance(scenario, FlatTimes(), simulated=False)
    assert (len(found), sum(found)) == (32, 120)


def test_one_stage_has_no_layout_string() -> None:
    assert layout_string((30,)) is None


@pytest.mark.parametrize(
    ("layers", "text"),
    [((3, 9, 9, 9), "Et*3|t*9|t*9|t*9L"), ((0, 4), "E|t*4L"), ((4, 0), "Et*4|L"), ((2, 0, 2), "Et*2||t*2L")],
)
def test_layout_notation(layers: tuple[int, ...], text: str) -> None:
    assert layout_string(layers) == text


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8).filter(any), st.integers(1, 2))
def test_megatron_core_reads_the_layout(layers: list[int], virtual: int) -> None:
    virtual = virtual if len(layers) % 2 == 0 else 1
    text = layout_string(layers)
    assert text is not None
    pipeline = len(layers) // virtual
    parsed = PipelineParallelLayerLayout(text, pipeline)
    parsed.validate_layer_layout(sum(layers), 0)
    assert parsed.virtual_pipeline_model_parallel_size == virtual
    found = [
        parsed.layout[stage % pipeline][stage // pipeline].count(LayerType.decoder) for stage in range(len(layers))
    ]
    assert found == layers


@pytest.mark.parametrize("preset", ["tiny-hybrid", "1b", "7b"])
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_inference_layout_minimises_the_fullest_rank(preset: str, tensor: int) -> None:
    """Against every split over two and three stages, counted from the names of the weights."""
    model = load_model_config(preset)
    sizes = {name: math.prod(shape) for name, shape in canonical_shapes(model).items()}
    vision = sum(size for name, size in sizes.items() if name.startswith("vision."))
    layer = sum(size for name, size in sizes.items() if name.startswith("language_model.decoder.layers.0.")) / tensor
    table = sizes["language_model.embedding.word_embeddings.weight"] / tensor

    def fullest(layers: Sequence[int]) -> float:
        held = [count * layer for count in layers]
        held[0] += vision + table
        held[-1] += table
        return max(held)

    total = model.llm.num_layers
    every = {2: [(n, total - n) for n in range(total + 1)]}
    every[3] = [(a, b, total - a - b) for a in range(total + 1) for b in range(total + 1 - a)]
    for stages, splits in every.items():
        found = balance_weights(model, stages=stages, tensor=tensor)
        assert sum(found) == total and len(found) == stages
        assert fullest(found) <= 1.0001 * min(map(fullest, splits))
