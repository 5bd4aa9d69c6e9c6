"""Every shipped recipe loads, and says what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megavl.config.load import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
STAGES = sorted(RECIPES.glob("*/stage*.yaml"))

# Paper (arXiv 2403.05525), Table 5: rate, schedule, warm-up, steps, batch, sequence length. Stage 1's 512 text tokens
# stand beside the 576 of one image.
TABLE_5 = {
    "1b/stage1": (1.0e-3, "cosine", 128, 15000, 256, 1088),
    "1b/stage2": (3.0e-5, "multistep", 2000, 96000, 1024, 4096),
    "1b/stage3": (2.0e-5, "cosine", 256, 10000, 256, 4096),
    "7b/stage1": (1.0e-3, "cosine", 128, 15000, 256, 1088),
    "7b/stage2": (4.2e-5, "multistep", 2000, 42000, 2304, 4096),
    "7b/stage3": (2.0e-5, "cosine", 256, 10000, 256, 4096),
}

# Tables 1 and 2: percent by category; the first row of each is text, the others are multimodal.
MIXTURES = {
    "stage2": {
        "text": 70.0, "interleaved": 13.1, "caption": 11.1, "table_chart": 2.1, "web_code": 0.4, "scene_text_ocr": 1.2,
        "document_ocr": 2.1,
    },
    "stage3": {"text": 47.9, "in_house": 10.5, "general": 35.5, "table_chart": 4.1, "web_code": 2.0},
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


def test_every_yaml_is_a_stage_or_its_base() -> None:
    named = (yaml.safe_load(path.read_text()).get("base", path.name) for path in STAGES)
    bases = {path.parent / base for path, base in zip(STAGES, named)}
    assert set(RECIPES.rglob("*.yaml")) == bases | set(STAGES)
    stages = {f"{model}/stage{stage}" for model in ("1b", "7b", "tiny") for stage in (1, 2, 3)}
    assert {name_of(path) for path in STAGES} == {*stages, "7b/stage2_paper"}


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert f"stage{recipe.training.stage}" == path.stem.removesuffix("_paper")
    assert recipe.checkpoint.init or recipe.checkpoint.allow_random_init


@pytest.mark.parametrize("name", TABLE_5)
def test_table_5(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    optimizer, training = recipe.optimizer, recipe.training
    assert TABLE_5[name] == (
        optimizer.lr, optimizer.schedule, optimizer.warmup_steps,
        training.steps, training.global_batch_size, recipe.data.seq_length,
    )  # fmt: skip
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_grad) == ((0.9, 0.95), 0.0, 1.0)


@pytest.mark.parametrize("model", ["1b", "7b"])
@pytest.mark.parametrize("stage", MIXTURES)
def test_mixture_is_the_papers(model: str, stage: str) -> None:
    data, table = load_recipe(RECIPES / model / f"{stage}.yaml").data, dict(MIXTURES[stage])
    assert sum(table.values()) == pytest.approx(100)
    assert data.multimodal_fraction == pytest.approx(1 - table["text"] / 100)
    sources = {source.name: source for source in data.mixture}
    sft = sources.pop("sft", None)
    assert set(sources) == set(table)
    for name, source in sources.items():
        text, multimodal = (table[name], 0) if name == "text" else (0, table[name])
        assert (source.weight.text, source.weight.multimodal) == (text, multimodal)
        assert source.path == f"data/{stage}/{name}"
    if stage == "stage2":
        # One hundredth of what stands beside it in either modality.
        assert sft is not None
        assert (sft.weight.text, sft.weight.multimodal) == pytest.approx((0.7, 0.3))
    else:
        assert sft is None


# Nodes of 8 GPUs: the launch scripts' defaults, and a single node where one copy of the model fits it.
NODES = [
    ("1b/stage1", 1), ("1b/stage1", 4), ("1b/stage2", 1), ("1b/stage2", 16), ("1b/stage3", 1), ("1b/stage3", 4),
    ("7b/stage1", 1), ("7b/stage1", 8), ("7b/stage2", 1), ("7b/stage2", 64), ("7b/stage3", 1), ("7b/stage3", 8),
    ("7b/stage2_paper", 2), ("7b/stage2_paper", 64),
]  # fmt: skip


@pytest.mark.parametrize(("name", "nodes"), NODES)
def test_batches_divide_over_the_nodes(name: str, nodes: int) -> None:
    load_recipe(RECIPES / f"{name}.yaml").data_parallel(8 * nodes)
