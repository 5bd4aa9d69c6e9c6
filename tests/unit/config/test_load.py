"""Recipes: what loads, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavl.config.errors import UsageError
from megavl.config.key_list import key_lines
from megavl.config.load import dump_recipe, load_model_config, load_recipe, to_dict

RECIPE = """
model: {preset: tiny-hybrid}
optimizer: {lr: 1.0e-3}
data: {sources: [{path: shards}], tokenizer: tok, seq_length: 512, multimodal_fraction: 0.5}
training: {stage: 1, steps: 10, global_batch_size: 8}
run: {dir: runs/x}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_recipe_round_trip_is_exact(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, overrides=["optimizer.lr=3e-4", "parallel.layout=[4]"])
    assert loaded.optimizer.lr == 3e-4
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(loaded))
    assert load_recipe(again) == loaded


def test_recipe_replaces_values_of_its_base(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\ntraining: {steps: 20}\n")
    assert load_recipe(child).training.steps == 20
    assert load_recipe(child).training.global_batch_size == 8
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("base: child.yaml\n")
    with pytest.raises(UsageError, match="may not have a base itself"):
        load_recipe(grandchild)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("paralel.tensor=2", ["paralel: unknown key", "did you mean 'parallel'"]),
        ("parallel.tensr=2", ["parallel.tensr: unknown key", "did you mean 'tensor'"]),
        ("data.sources=[{pth: x}]", ["data.sources.0.pth", "did you mean 'path'"]),
        ("model.llm.num_layer=3", ["model.llm.num_layer", "did you mean 'num_layers'"]),
        ("model.preset=70b", ["model.preset", "'70b'", "tiny-hybrid"]),
        ("training.steps=many", ["training.steps", "'many'"]),
        ("checkpoint.keep=1", ["checkpoint.keep", "1"]),
        ("training.steps=true", ["training.steps: found True", "a number is expected"]),
        ("training.steps=9999999999", ["training.steps: found 9999999999", "less than or equal to 1000000000"]),
        ("training.seed=9223372036854775808", ["training.seed", "less than"]),
        ("training.threads=100000", ["training.threads: found 100000", "1024"]),
        ("parallel.timeout_s=1000000000000", ["parallel.timeout_s: found 1000000000000"]),
        ("data.num_workers=10000", ["data.num_workers: found 10000", "'auto'", "or equal to 1024"]),
        ("data.num_workers=true", ["data.num_workers: found True", "'auto'", "a number is expected"]),
        ("evaluation.interval=true", ["evaluation.interval: found True"]),
        ("optimizer.lr=.inf", ["optimizer.lr: found inf", "finite"]),
        ("optimizer.weight_decay=.inf", ["optimizer.weight_decay: found inf", "finite"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas.1: found 1", "less than 1"]),
        ("model.llm.num_layers=0", ["model.llm.num_layers: found 0"]),
        ("model.llm.num_layers=5000", ["model.llm.num_layers: found 5000", "4096"]),
        ("model.llm.num_attention_heads=0", ["model.llm.num_attention_heads: found 0"]),
        ("model.llm.hidden_size=-128", ["model.llm.hidden_size: found -128"]),
        ("model.llm.rope_theta=.nan", ["model.llm.rope_theta: found nan"]),
        ("model.llm.rms_norm_eps=0", ["model.llm.rms_norm_eps: found 0"]),
        ("model.siglip.heads=-2", ["model.siglip.heads: found -2"]),
        ("model.sam.window_size=0", ["model.sam.window_size: found 0"]),
        ("model.sam.global_attn_indexes=[-1]", ["model.sam.global_attn_indexes.0: found -1"]),
        ("parallel.tensor=3", ["parallel.tensor: 3 does not divide", "num_attention_heads 4"]),
        ("parallel.sequence_parallel=true", ["parallel.sequence_parallel", "parallel.tensor > 1"]),
        ("parallel.layout=[2,-2]", ["parallel.layout.1: found -2", "greater than or equal to 0"]),
        ("parallel.layout=[2,2]", ["parallel.layout", "parallel.pipeline 1 x"]),
        ("parallel.layout=[3]", ["parallel.layout", "adds up to 3", "num_layers is 4"]),
        ("parallel.virtual_pipeline=2", ["parallel.virtual_pipeline: 2", "parallel.pipeline > 1"]),
        ("parallel.vision=split_tp", ["parallel.vision: split_tp", "parallel.tensor ranks, which is 1", "recompute"]),
        ("parallel.vision=split_all", ["parallel.vision: split_all", "parallel.tensor x parallel.pipeline"]),
        ("parallel.overlap_grad_reduce=false", ["parallel.overlap_param_gather"]),
        ("parallel.distributed_optimizer=false", ["parallel.overlap_param_gather: true", "distributed_optimizer"]),
        ("data.seq_length=9", ["data.seq_length: 9", "9 tokens"]),
        ("data.sources=[]", ["data.sources", "empty"]),
        ("training.train=[]", ["training.train", "names nothing", "siglip"]),
        ("training.train=[llm,vision]", ["training.train", "'vision'", "siglip"]),
        (
            "optimizer.warmup_steps=11",
            ["optimizer.warmup_steps: 11", "training.steps 10", "set optimizer.warmup_steps to 10 or less"],
        ),
        ("optimizer.min_lr=0.5", ["optimizer.min_lr: 0.5 is above optimizer.lr", "or less"]),
        ("run.timeline_steps=[3,11]", ["run.timeline_steps: 11", "training.steps 10"]),
        ("run.profile_steps=[3,11]", ["run.profile_steps: 11", "training.steps 10"]),
        ("run.memory_snapshot_step=11", ["run.memory_snapshot_step: 11", "training.steps 10"]),
        ("optimizer.milestones=[0.5]", ["optimizer.factors"]),
        ("model.sam=null", ["model.adaptor.kind", "needs a model.sam"]),
        ("model.sam.neck_channels=8", ["model.sam.neck_channels", "64"]),
        ("model.sam.image_size=256", ["model.sam.image_size", "8/3"]),
        ("model.image_token_id=5000", ["model.image_token_id", "1024"]),
        ("run.dir=''", ["run.dir: found ''", "it is empty"]),
        ("run.dir=~/runs", ["run.dir: found '~/runs'", "begins with ~"]),
        ("checkpoint.init=~me/x", ["checkpoint.init: found '~me/x'", "begins with ~"]),
        ("lr", ["key.path=value"]),
        ("a=[", ["not valid YAML"]),
    ],
)
def test_refusal_names_path_value_and_remedy(recipe: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe, overrides=[override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["/tmp/a #b", "/tmp/two  words", "/tmp/a\nb", "/tmp/%{x}", "x:y"])
def test_a_typed_path_stays_the_text_it_is(recipe: Path, path: str) -> None:
    assert load_recipe(recipe, overrides=[f"run.dir={path}"]).run.dir == path


@pytest.mark.parametrize(
    ("override", "source"),
    [
        ("parallel.tensr=2", "on the command line: parallel.tensr"),
        ("parallel={tensr: 2}", "on the command line: parallel.tensr"),
        ("training.steps=many", "on the command line: training.steps"),
        ("model.preset=70b", "on the command line: model.preset"),
        ("parallel=auto", "on the command line: parallel: auto"),
        ("data.sources.shown.max_epoch=2", "on the command line: data.sources.0.max_epoch"),
        ("data.sources.other.path=x", "on the command line: data.sources.other: no such entry; there are shown"),
        ("steps", "on the command line: 'steps'"),
        ("training.steps=4", "{child} with training.steps=4 on the command line: optimizer.warmup_steps: 5 exceeds"),
        ("run.dir=x", None),
    ],
)
def test_message_names_where_the_value_stands(recipe: Path, tmp_path: Path, override: str, source: str | None) -> None:
    child = tmp_path / "child.yaml"
    sources = "data: {sources: [{name: shown, path: shards}]}\n"
    child.write_text(f"base: recipe.yaml\noptimizer: {{warmup_steps: 5}}\n{sources}")
    if source is None:
        load_recipe(child, overrides=[override])
        return
    with pytest.raises(UsageError) as caught:
        load_recipe(child, overrides=[override])
    assert str(caught.value).startswith(source.format(child=child))


def test_message_names_the_base_file(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\ntraining: {steps: 20}\n")
    recipe.write_text(RECIPE.replace("lr:", "lrr:"))
    with pytest.raises(UsageError, match=rf"^{recipe}: optimizer\.lrr: unknown key"):
        load_recipe(child, overrides=["run.dir=x"])
    child.write_text("base: no/recipe.yaml\n")
    with pytest.raises(UsageError, match=rf"^{child}: base: 'no/recipe.yaml' .* relative to the recipe's own folder"):
        load_recipe(child)


def test_every_key_is_listed_with_its_meaning(recipe: Path) -> None:
    lines = key_lines()
    keys = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert all(len(line.split(maxsplit=2)) == 3 for line in keys.values()), "a field has no docstring"
    plain = to_dict(load_recipe(recipe))
    plain["data"]["sources"] = {"NAME": plain["data"]["sources"][0]}
    assert set(keys) == set(_paths(plain))
    assert "required" in keys["optimizer.lr"] and "fp32 | bf16" in keys["training.precision"]
    assert "of the preset" in keys["model.llm.hidden_size"] and " 600 " in keys["parallel.timeout_s"]


def _paths(node: dict[str, Any], at: str = "") -> list[str]:
    below = [(f"{at}{key}", value) for key, value in node.items()]
    return [p for path, value in below for p in (_paths(value, f"{path}.") if isinstance(value, dict) else [path])]


@pytest.mark.parametrize("text", ["- 1", "{", "model: 3"])
def test_broken_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="broken.yaml"):
        load_recipe(path)
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe(tmp_path / "absent.yaml")


def test_world_must_fit(recipe: Path) -> None:
    loaded = load_recipe(recipe, overrides=["parallel.tensor=2", "parallel.pipeline=2", "parallel.layout=[1,3]"])
    assert loaded.data_parallel(8) == 2
    with pytest.raises(UsageError, match="6 processes are no multiple of .* = 4"):
        loaded.data_parallel(6)
    with pytest.raises(UsageError, match="global_batch_size: 8 is no multiple of data-parallel ranks 3"):
        loaded.data_parallel(12)


def test_presets_keep_the_topology() -> None:
    for name, tokens, canvas in (
        ("1b", 576, 384),
        ("7b", 576, 1024),
        ("tiny-hybrid", 9, 128),
        ("tiny-siglip", 9, 48),
    ):
        config = load_model_config(name)
        assert (config.image_tokens, config.canvas_size, config.image_geometry.tokens) == (tokens, canvas, tokens)


def test_virtual_stages_need_whole_rounds_of_micro_batches(recipe: Path) -> None:
    cut = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.layout=[1,1,1,1]"]
    assert load_recipe(recipe, overrides=cut).data_parallel(4) == 2
    odd = load_recipe(recipe, overrides=[*cut, "training.global_batch_size=6"])
    with pytest.raises(UsageError, match="3 micro-batches .* training.global_batch_size 8 or"):
        odd.data_parallel(4)
