"""A run that starts from a checkpoint is the run that its recipe describes, or says in one line how it is not."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench.engines.random_models import random_weights, write_tokenizer
from megavl.checkpoint.reader import resolve
from megavl.checkpoint.store import read_manifest
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.errors import CheckpointError, UsageError
from megavl.config.load import dump_recipe, load_model_config, load_recipe
from megavl.config.recipe import Recipe
from megavl.convert.run_facts import run_facts
from megavl.data.same_tokenizer import difference
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.main.cli import main
from megavl.main.open_recipe import open_recipe
from megavl.model.build import BuildSpec
from megavl.parallel import groups
from megavl.planner.layouts.layout import layout_string
from megavl.train.batch_broadcast import next_step
from megavl.train.identity import Fixed, compare_resumed, compare_start
from megavl.train.model_chunks import build_model_chunks
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.progress import Progress
from megavl.train.state import RunState
from megavl.train.step import train_step
from megavl.weights.dtypes import DTYPE_OF_PRECISION
from tests.distributed.gather import own_state
from tests.distributed.synthetic import SyntheticSteps
from tests.unit.main.test_foreign_files import manifest

RECIPES = Path(__file__).resolve().parents[3] / "launch/recipes/tiny"
ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto", "parallel.overlap_param_gather=false")
NARROW = {"llm": {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "vocab_size": 512}}
MODEL = load_model_config("tiny-siglip", **NARROW)
# The tiny recipes name a system text of their own.
TAKEN = dataclasses.replace(MODEL, system_prompt="")
STEP = 3


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    groups.start(recipe("/nowhere").parallel, seed=1)
    yield
    groups.stop()


def recipe(run: Path | str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / "stage2.yaml", overrides=[*given(run), *overrides])


def given(run: Path | str) -> list[str]:
    sizes = json.dumps({"preset": "tiny-siglip", **NARROW})
    return [
        *(*ALONE, f"model={sizes}", f"run.dir={run}", "checkpoint.init=null", "data.seq_length=64"),
        *("training.steps=4", "training.global_batch_size=4", "optimizer.schedule=cosine", "optimizer.min_lr=0"),
        *("optimizer.warmup_steps=1", "optimizer.lr=1e-3", "training.train=[llm, adaptor]"),
    ]


def run_state(recipe: Recipe, tokenizer: Tokenizer) -> RunState:
    precision = recipe.training.precision
    model = build_model_chunks(BuildSpec.of(recipe, layout=layout_string((2,)), dtype=DTYPE_OF_PRECISION[precision]))
    optimizer = build_optimizer(model, optimizer=recipe.optimizer, bf16=precision == "bf16")
    return RunState(recipe, model=model, optimizer=optimizer, fingerprint="data", tokenizer=tokenizer)


def saved_run(run: Path, tokenizer: Tokenizer, *overrides: str) -> RunState:
    """A run that stopped after step 3; its moments are those of one real step."""
    state = run_state(recipe(run, *overrides), tokenizer)
    source = SyntheticSteps(
        MODEL, modality="text", seq_length=64, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    set_learning_rate(state.optimizer, lr=1e-3, weight_decay=0.0)
    train_step(state.model, state.optimizer, next_step(source, 0), stop_flag=False)
    state.save(Progress(step=STEP, bad_steps=0))
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("run")
    saved_run(path, tokenizer)
    return path


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Start weights of a model that is no preset."""
    out = tmp_path_factory.mktemp("init")
    files = {f"tokenizer/{path.name}": path for path in tokenizer.files}
    write_model_checkpoint(out, config=MODEL, tensors=random_weights(MODEL), files=files)
    return out


def lines(run: Path, tokenizer: Tokenizer, *overrides: str, fingerprint: str = "data") -> list[str]:
    changed = recipe(run, *overrides)
    path = resolve(changed.checkpoint_dir)
    fixed = Fixed.of(changed, fingerprint=fingerprint)
    return compare_resumed(changed, path, content=read_manifest(path)["content"], fixed=fixed, tokenizer=tokenizer)


OTHER_MODELS = [
    ("llm.num_attention_heads", 4, 8),
    ("llm.rope_theta", 10000.0, 500000.0),
    ("llm.rms_norm_eps", "1e-06", "1e-05"),
    ("siglip.heads", 4, 2),
    ("siglip.layer_norm_eps", "1e-06", "1e-05"),
    ("image_token_id", 3, 4),
]


@pytest.mark.parametrize(("key", "old", "new"), OTHER_MODELS)
def test_another_model_is_refused(key: str, old: Any, new: Any, run: Path, init: Path, tokenizer: Tokenizer) -> None:
    """No shape of a tensor shows any of these."""
    override = f"model.{key}={new}"
    for compare in (
        lambda: lines(run, tokenizer, override),
        lambda: lines(run, tokenizer, override, "checkpoint.force_resume=true"),
        lambda: compare_start(recipe(run, override), resolve(init), tokenizer=tokenizer),
    ):
        with pytest.raises(UsageError) as error:
            compare()
        message = str(error.value)
        assert f"model.{key} is {old} in the checkpoint and {new} in the recipe" in message
        assert f"set model.{key}={old}" in message and "force_resume" not in message


def test_same_recipe_resumes_without_a_word(run: Path, tokenizer: Tokenizer) -> None:
    assert lines(run, tokenizer) == []


def test_recipe_wins_with_a_line_for_each_key(run: Path, tokenizer: Tokenizer) -> None:
    changes = ("optimizer.lr=2e-3", "training.precision=bf16", "optimizer.betas=[0.8, 0.9]", "model.llm.init_std=0.01")
    found = lines(run, tokenizer, *changes)
    for key, old, new in (
        ("optimizer.lr", "0.001", "0.002"),
        ("training.precision", "fp32", "bf16"),
        ("optimizer.betas", "[0.9, 0.95]", "[0.8, 0.9]"),
        ("model.llm.init_std", "0.02", "0.01"),
    ):
        assert [line for line in found if line.startswith(f"{key}: {old} before, {new} now")], found
    assert len(found) == len(changes) + 1, "and the learning rate"


def test_longer_cosine_run_says_that_the_rate_jumps(run: Path, tokenizer: Tokenizer) -> None:
    found = lines(run, tokenizer, "training.steps=400")
    assert found[0].startswith("training.steps: 4 before, 400 now")
    assert re.search(r"learning rate jumps from 2\.50e-04 at step 3 to 1\.00e-03 at step 4", found[1]), found
    kept = lines(run, tokenizer, "optimizer.factors=[0.3, 0.1]")
    assert re.search(r"learning rate jumps from 2\.50e-04 at step 3 to 0\.00e\+00 at step 4", kept[1]), kept


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.seed=5", "seed is 1234 in the checkpoint and 5 in the recipe"),
        ("training.global_batch_size=8", "global_batch_size is 4 in the checkpoint and 8 in the recipe"),
        ("data.multimodal_fraction=0.5", "multimodal_fraction is 0.8 in the checkpoint and 0.5 in the recipe"),
    ],
)
def test_force_says_what_it_forced(override: str, words: str, run: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=f"{words}.*set checkpoint.force_resume=true"):
        lines(run, tokenizer, override)
    assert lines(run, tokenizer, override, "checkpoint.force_resume=true") == [f"forced: {words}"]


def test_other_data_are_refused_or_forced(run: Path, tokenizer: Tokenizer) -> None:
    words = "data_fingerprint is data in the checkpoint and other in the recipe"
    with pytest.raises(UsageError, match=f"{words}.*set checkpoint.force_resume=true"):
        lines(run, tokenizer, fingerprint="other")
    assert lines(run, tokenizer, "checkpoint.force_resume=true", fingerprint="other") == [f"forced: {words}"]


@pytest.mark.parametrize("force", ["true", "false"])
def test_no_advice_to_force_what_cannot_be_forced(force: str, run: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError) as error:
        lines(run, tokenizer, "training.train=[adaptor]", f"checkpoint.force_resume={force}")
    assert "trainable_parts" in str(error.value) and "force_resume" not in str(error.value)
    assert f"checkpoint.init={run}/checkpoints/iter_0000003" in str(error.value)


def test_consumed_samples_add_up_over_batch_sizes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved_run(tmp_path, tokenizer)
    forced = recipe(tmp_path, "training.global_batch_size=8", "checkpoint.force_resume=true")
    state = run_state(forced, tokenizer)
    resumed = state.restore()
    assert resumed is not None
    progress = resumed[0].after(skipped=False)
    content = read_manifest(state.save(progress))["content"]
    assert (content["step"], content["consumed_samples"]) == (STEP + 1, 3 * 4 + 8)
    again = run_state(forced, tokenizer).restore()
    assert again is not None and again[0] == progress


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision_keeps_weights_and_moments(
    before: str, after: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    old = saved_run(tmp_path, tokenizer, f"training.precision={before}")
    new = run_state(recipe(tmp_path, f"training.precision={after}", "optimizer.betas=[0.8, 0.9]"), tokenizer)
    assert new.restore() is not None
    kept, found = (own_state(state.model, state.optimizer) for state in (old, new))
    compared = [name for name in kept if name.endswith((" master", " exp_avg", " exp_avg_sq"))]
    assert len(compared) > 30 and all(torch.equal(kept[name], found[name]) for name in compared)
    assert {group["betas"] for group in new.optimizer.param_groups} == {(0.8, 0.9)}, "the recipe wins"


def test_checkpoints_name_the_one_that_the_run_began_with(
    init: Path, run: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    assert read_manifest(resolve(run / "checkpoints"))["content"]["start"] is None
    state = run_state(recipe(tmp_path, f"checkpoint.init={init}"), tokenizer)
    state.start_from(str(init))
    path = state.save(Progress(step=1, bad_steps=0))
    start = read_manifest(path)["content"]["start"]
    taken = resolve(init).resolve()
    assert start == {"checkpoint": str(taken), "step": 0, "digest": read_manifest(taken)["digest"]}
    assert next_start(tmp_path, tokenizer, step=2) == {"start": start}
    assert [part.checkpoint.name for part in run_facts(path).stages] == [path.name]
    assert "iter_0000000, converted" in run_facts(path).origin
    # Older versions wrote none.
    last = tmp_path / "checkpoints/iter_0000002"
    content = {key: value for key, value in read_manifest(last)["content"].items() if key != "start"}
    manifest(content=content)(last)
    assert next_start(tmp_path, tokenizer, step=3) == {}


def next_start(run: Path, tokenizer: Tokenizer, *, step: int) -> dict[str, Any]:
    """What the next checkpoint of a resumed run says about its start."""
    state = run_state(recipe(run), tokenizer)
    assert state.restore() is not None
    content = read_manifest(state.save(Progress(step=step, bad_steps=0)))["content"]
    return {key: value for key, value in content.items() if key == "start"}


def test_weights_in_the_own_directory_are_answered(init: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copytree(init, tmp_path / "checkpoints")
    with pytest.raises(UsageError) as error:
        lines(tmp_path, tokenizer)
    moved = re.search(r"mkdir -p (\S+) && mv (\S+) \1/, and set checkpoint.init=\1", str(error.value))
    assert moved is not None and resolve(moved[2])


def test_checkpoint_that_contradicts_itself_is_refused(init: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = recipe(tmp_path, "model.llm.num_attention_heads=8")
    files = {"recipe.yaml": dump_recipe(other).encode()}
    path = write_model_checkpoint(tmp_path, config=MODEL, tensors=random_weights(MODEL), files=files)
    with pytest.raises(CheckpointError, match="contradict each other: model.llm.num_attention_heads is 4 and 8"):
        compare_start(recipe(tmp_path), path, tokenizer=tokenizer)


@pytest.mark.parametrize("values", [{"bad_steps": "0"}, {"global_batch_size": [4]}, {"earlier_batches": [[1, 2, 3]]}])
def test_forged_progress_is_refused(values: dict[str, Any], run: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = Path(shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")) / "iter_0000003"
    content = read_manifest(path)["content"]
    manifest(content={**content, **values})(path)
    with pytest.raises(CheckpointError, match=rf"manifest.json: content.{next(iter(values))} is .* no run writes"):
        run_state(recipe(tmp_path), tokenizer).restore()


def test_other_folders_as_init_are_answered(run: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in ("empty", "siglip"):
        (tmp_path / name).mkdir()
    (tmp_path / "siglip" / "config.json").write_text(json.dumps({"model_type": "siglip\x1b"}))
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (run, f"a run's folder; its checkpoints are in {run}/checkpoints"),
        (
            tmp_path,
            f"a Hugging Face folder, not a MegaVL checkpoint; convert it with `megavl convert from-hf {tmp_path}",
        ),
        (tmp_path / "siglip", "a Hugging Face folder of model_type 'siglip\\x1b'; `megavl convert init`"),
        (tmp_path / "empty", "empty (checked 0); give a checkpoint, or the directory that holds"),
        (tmp_path / "pipe", "not a directory; give a checkpoint"),
        (tmp_path / "model.safetensors", "a file"),
    ):
        with pytest.raises(CheckpointError) as error:
            resolve(path)
        assert words in str(error.value)


@pytest.fixture
def changed_tokenizer(tmp_path: Path) -> Path:
    folder = write_tokenizer(tmp_path / "changed")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["e"] = vocabulary["e"], vocabulary.get("red", 499)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_another_tokenizer_is_refused(changed_tokenizer: Path, init: Path, run: Path, tokenizer: Tokenizer) -> None:
    other = open_tokenizer(changed_tokenizer)
    with pytest.raises(UsageError, match=r"data\.tokenizer: .*changed.* token 'e' has id .* here and .* there"):
        compare_start(recipe(run), resolve(init), tokenizer=other)
    with pytest.raises(UsageError, match=r"data\.tokenizer is another one: token 'e'"):
        lines(run, other)


def test_another_post_processor_is_no_other_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}, indent=3))
    assert difference(tokenizer, open_tokenizer(folder)) is None


def test_model_from_init_takes_all_sizes(init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(RECIPES / "stage2.yaml")
    overrides = [*given(tmp_path / "run"), "model={from: init}", f"checkpoint.init={init}"]
    found = open_recipe(path, overrides=overrides)
    assert found.model == TAKEN
    (tmp_path / "recipe.yaml").write_text(dump_recipe(found))
    assert load_recipe(tmp_path / "recipe.yaml") == found, "what a run saves holds the real values"
    assert main(["plan", path, *overrides]) == 0
    assert "tiny-siglip with llm.hidden_size 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["model={from: init}", "checkpoint.init=null"], 2, "checkpoint.init, which is not set"),
        (["model={from: elsewhere}"], 2, "model.from: found 'elsewhere'"),
        (["model={from: init}", "checkpoint.init=/nowhere"], 4, "checkpoint.init: /nowhere: no such directory"),
    ],
)
def test_model_from_nothing_is_answered(
    overrides: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(RECIPES / "stage2.yaml"), *given(tmp_path / "run"), *overrides]) == code
    assert words in capsys.readouterr().err


def test_resumed_run_needs_no_init_for_its_sizes(run: Path) -> None:
    overrides = [*given(run), "model={from: init}", "checkpoint.init=/gone"]
    assert open_recipe(str(RECIPES / "stage2.yaml"), overrides=overrides).model == TAKEN
