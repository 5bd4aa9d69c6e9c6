"""What a run takes from each source: shares, epochs, and what is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavl.config.errors import DataError
from megavl.config.load import load_recipe
from megavl.config.recipe import Recipe
from megavl.data.mixture import Counts, check_epochs, recipe_mixture, render, source_plans

RECIPES = Path(__file__).resolve().parents[3] / "launch" / "recipes"


def small(sources: str, *more: str) -> Recipe:
    changes = ["training.steps=100", "training.global_batch_size=8", "data.root=/d", "data.multimodal_fraction=0.25"]
    changes += ["data.modality_warmup_steps=0", f"data.sources={sources}", *more]
    return load_recipe(RECIPES / "tiny/stage2.yaml", overrides=changes)


def counts(*pairs: tuple[int, int]) -> list[Counts]:
    return [{"text": text, "multimodal": multimodal} for text, multimodal in pairs]


def rows_of(recipe: Recipe, have: list[Any]) -> dict[tuple[str, str], tuple[float, int, float | None]]:
    mixture = recipe_mixture(recipe, have)
    rows = source_plans(mixture, data=recipe.data, counts=have, steps=recipe.training.steps)
    return {(row.name, row.modality): (row.share, row.drawn, row.epochs) for row in rows}


def test_shares_and_epochs_of_the_papers_stage_2() -> None:
    recipe = load_recipe(RECIPES / "7b/stage2.yaml")
    rows = rows_of(recipe, [None] * 8)
    assert rows["interleaved", "multimodal"][0] == pytest.approx(13.1 / 30.3)
    assert rows["sft", "text"][0] == rows["sft", "multimodal"][0] == pytest.approx(0.01 / 1.01)
    total = sum(drawn for _, drawn, _ in rows.values())
    assert total == 42000 * 2304
    multimodal = sum(drawn for (_, kind), (_, drawn, _) in rows.items() if kind == "multimodal")
    # 30% of all steps, less what the warm-up over 2000 steps leaves out: half of its share.
    assert multimodal / total == pytest.approx(0.3 * (42000 - 1000.5) / 42000, abs=1 / 42000)


def test_weights_apply_to_the_modalities_they_name() -> None:
    recipe = small("[{name: a, weight: 3}, {name: b}, {name: c, weight: {text: 4}}]")
    rows = rows_of(recipe, counts((10, 10), (10, 10), (10, 10)))
    assert rows["a", "text"] == (3 / 8, 225, 22.5) and rows["c", "text"] == (0.5, 300, 30.0)
    assert rows["a", "multimodal"] == (0.75, 150, 15.0) and rows["b", "multimodal"] == (0.25, 50, 5.0)
    # What is there and never read is said, not hidden.
    assert rows["c", "multimodal"] == (0.0, 0, 0.0)
    mixture = recipe_mixture(recipe, counts((10, 10), (10, 10), (10, 10)))
    shown = render(
        source_plans(mixture, data=recipe.data, counts=counts((10, 10), (10, 10), (10, 10)), steps=100),
        mixture=mixture,
        steps=100,
    )
    assert shown[0] == "data: 100 steps of 8 sequences; 75 text steps, 25 multimodal ones (25.00%)"
    assert shown[1].split() == ["a", "text", "37.50%", "225", "sequences", "22.50", "epochs", "of", "10"]
    assert shown[-1].split() == ["c", "multimodal", "not", "drawn", "0", "of", "10", "sequences"]


def test_missing_modalities_leave_their_share_to_others() -> None:
    recipe = small("[{name: a}, {name: b}]")
    rows = rows_of(recipe, counts((10, 0), (10, 5)))
    assert ("a", "multimodal") not in rows and rows["b", "multimodal"] == (1.0, 200, 40.0)


@pytest.mark.parametrize(
    ("have", "message"),
    [
        (((5, 5), (5, 0)), r"data\.sources\.b: /d/b holds no multimodal sequence, for which alone it has a weight"),
        (((0, 5), (0, 5)), r"no source holds text sequences, which data\.multimodal_fraction 0\.25 asks for"),
    ],
)
def test_missing_modality_is_named(have: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recipe_mixture(small("[{name: a}, {name: b, weight: {multimodal: 2}}]"), counts(*have))


def test_one_modality_suffices_where_one_is_drawn() -> None:
    recipe_mixture(small("[{name: a}]", "data.multimodal_fraction=0"), counts((4, 0)))
    recipe_mixture(small("[{name: a}]", "data.multimodal_fraction=1"), counts((0, 4)))
    with pytest.raises(DataError, match="no source holds text sequences"):
        extra = ("data.multimodal_fraction=1", "data.modality_warmup_steps=5")
        recipe_mixture(small("[{name: a}]", *extra), counts((0, 4)))


def test_too_many_epochs_are_refused() -> None:
    recipe, have = small("[{name: a}, {name: b, max_epochs: 1.5}]"), counts((400, 200), (400, 50))
    mixture = recipe_mixture(recipe, have)
    # 100 multimodal sequences of b's 50: two epochs. 75 are allowed.
    with pytest.raises(DataError) as caught:
        check_epochs(mixture, data=recipe.data, counts=have, steps=100)
    message = str(caught.value)
    assert "data.sources.b: 100 steps draw 100 of its 50 multimodal sequences, 2.00 epochs" in message
    assert "above max_epochs 1.5" in message and "\n" not in message
    longest = int(message.split("at most ")[1].split()[0])
    assert mixture.drawn(longest, source=1, modality="multimodal") <= 75
    assert mixture.drawn(longest + 1, source=1, modality="multimodal") > 75
    check_epochs(mixture, data=recipe.data, counts=have, steps=longest)
