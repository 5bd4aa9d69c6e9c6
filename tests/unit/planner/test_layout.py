"""The layer split against brute force, and its notation against megatron-core's own parser."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megavl.config.load import load_model_config
from megavl.config.recipe import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from megavl.convert.flat_names import flat_shapes
from megavl.planner.blocks import vision_blocks
from megavl.planner.layout import (
    StageCosts,
    balance_layers,
    balance_weights,
    expected_costs,
    expected_images,
    layout_string,
    resolve_layout,
    split_layers,
    stage_costs,
)


def recipe_7b(*, fraction: float = 0.3, train: tuple[str, ...] | None = None, **parallel: Any) -> Recipe:
    return Recipe(
        model=load_model_config("7b"),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(lr=1e-4),
        data=DataConfig(
            sources=(SourceConfig(path="data"),), tokenizer="tok", seq_length=4096, multimodal_fraction=fraction
        ),
        training=TrainingConfig(stage=2, train=train, steps=10, global_batch_size=64),
        run=RunConfig(dir="run"),
    )


def every_split(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    if stages == 1:
        yield (layers,)
        return
    for here in range(layers + 1):
        for rest in every_split(layers - here, stages - 1):
            yield (here, *rest)


COST = st.floats(min_value=0, max_value=20, allow_nan=False)


@given(
    layers=st.integers(1, 9),
    stages=st.integers(1, 4),
    layer=st.floats(min_value=0.01, max_value=5),
    first=COST,
    last=COST,
)
def test_split_is_the_best_of_all(layers: int, stages: int, layer: float, first: float, last: float) -> None:
    costs = StageCosts(layer=layer, first=first, last=last)

    def key(split: tuple[int, ...]) -> tuple[float, int, tuple[int, ...]]:
        slowest = max(costs.of(stage, layers=n, stages=stages) for stage, n in enumerate(split))
        return slowest, sum(n * n for n in split), split

    assert split_layers(layers, stages=stages, costs=costs) == min(every_split(layers, stages), key=key)


def test_equal_stages_get_equal_layers() -> None:
    assert split_layers(32, stages=8, costs=StageCosts(layer=1, first=0, last=0)) == (4,) * 8


def test_a_heavy_first_stage_gets_no_layers() -> None:
    assert split_layers(6, stages=3, costs=StageCosts(layer=1, first=9, last=0)) == (0, 3, 3)


def test_large_pipelines_are_split_at_once() -> None:
    split = split_layers(120, stages=40, costs=StageCosts(layer=1, first=2.5, last=1.5))
    assert sum(split) == 120
    assert len(split) == 40
    assert max(split) == 4


def test_the_encoders_take_layers_off_the_first_stage() -> None:
    text = balance_layers(recipe_7b(train=("llm",), fraction=0.0, tensor=4, pipeline=4))
    stage_2 = balance_layers(recipe_7b(tensor=4, pipeline=4))
    multimodal = balance_layers(recipe_7b(fraction=1.0, tensor=4, pipeline=4))
    assert text == (8, 8, 8, 6), "the output layer costs about two decoder layers"
    assert sum(stage_2) == sum(multimodal) == 30
    assert text[0] > stage_2[0] > multimodal[0]


def test_encoder_load_on_the_first_stage_equals_the_published_share() -> None:
    """Published: 5 images add 64% to stage 0 at TP4 PP4 when every tensor-parallel rank repeats the encoders."""
    recipe = recipe_7b(train=("llm",), tensor=4, pipeline=4)
    costs = stage_costs(recipe, images_per_sequence=5)
    stage = (30 * costs.layer + costs.last) / 4
    blocks = [block for block in vision_blocks(recipe.model) if block.part != "adaptor"]
    assert 5 * sum(block.forward for block in blocks) / stage == pytest.approx(0.64, abs=0.005)
    assert costs.first == 5 * sum(block.forward + block.overhead for block in vision_blocks(recipe.model))


def test_a_text_only_micro_batch_costs_no_encoder() -> None:
    assert stage_costs(recipe_7b(), images_per_sequence=0).first == 0


def test_encoders_are_not_divided_over_tensor_ranks() -> None:
    one, four = (expected_costs(recipe_7b(tensor=t), images_per_sequence=5) for t in (1, 4))
    assert four.first == one.first
    assert four.layer == one.layer / 4
    assert four.last == one.last / 4


def test_assumed_images_fit_the_sequence() -> None:
    assert expected_images(recipe_7b()) == 5
    assert expected_images(recipe_7b(fraction=0.0)) == 0


def test_resolve_keeps_a_given_layout() -> None:
    given_layout = (1, 9, 10, 10)
    assert resolve_layout(recipe_7b(pipeline=4, layout=given_layout)) == given_layout
    assert resolve_layout(recipe_7b(pipeline=4)) == balance_layers(recipe_7b(pipeline=4))
    assert resolve_layout(recipe_7b()) == (30,)


def test_one_stage_has_no_layout_string() -> None:
    assert layout_string((30,)) is None


@pytest.mark.parametrize(
    ("layers", "text"),
    [((3, 9, 9, 9), "Et*3|t*9|t*9|t*9L"), ((0, 4), "E|t*4L"), ((4, 0), "Et*4|L"), ((2, 0, 2), "Et*2||t*2L")],
)
def test_layout_notation(layers: tuple[int, ...], text: str) -> None:
    assert layout_string(layers) == text


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8).filter(any))
def test_megatron_core_reads_the_layout(layers: list[int]) -> None:
    text = layout_string(layers)
    assert text is not None
    parsed = PipelineParallelLayerLayout(text, len(layers))
    parsed.validate_layer_layout(sum(layers), 0)
    assert parsed.virtual_pipeline_model_parallel_size == 1
    assert [stage[0].count(LayerType.decoder) for stage in parsed.layout] == layers


@pytest.mark.parametrize("preset", ["tiny-hybrid", "1b", "7b"])
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_for_inference_the_fullest_rank_is_as_empty_as_it_can_be(preset: str, tensor: int) -> None:
    """Against every split over two and three stages, counted from the names of the weights."""
    model = load_model_config(preset)
    sizes = {name: math.prod(shape) for name, shape in flat_shapes(model).items()}
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
