"""Folders as people find them: MegaVL reads the weights that transformers itself would read, or says what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekVLForConditionalGeneration
from transformers import __version__ as release

from megavl.checkpoint.reader import load_model_config as config_of_checkpoint
from megavl.checkpoint.reader import resolve
from megavl.config.errors import CheckpointError
from megavl.config.identity import model_name
from megavl.config.load import dump_recipe, load_model_config, load_recipe
from megavl.convert import native_format, original_format
from megavl.convert.hf_read import read_config
from megavl.convert.open_weights import find_weights, open_weights
from megavl.convert.tokenizer_files import TokenizerIds
from megavl.main.cli import main

State = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"
OURS = {
    HEAD: "language_model.output_layer.weight",
    EMBEDDING: "language_model.embedding.word_embeddings.weight",
    NORM: "language_model.decoder.final_layernorm.weight",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
IDS = TokenizerIds(bos=0, eos=1, pad=1, image=3)


@pytest.fixture(scope="module")
def state(sources: dict[str, Path]) -> State:
    return load_file(sources["tiny-siglip"] / "model.safetensors")


@pytest.fixture
def folder(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with a configuration and without weights."""
    out = tmp_path / "model"
    shutil.copytree(sources["tiny-siglip"], out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


def edit(path: Path, **values: Any) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def filled(state: State, value: float, *, without: tuple[str, ...] = ()) -> State:
    """The same names and shapes with one value everywhere, so that the file is known from any number."""
    return {name: torch.full_like(tensor, value) for name, tensor in state.items() if name not in without}


def save(folder: Path, name: str, tensors: State) -> None:
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name, metadata={"format": "pt"})


def save_index(folder: Path, weight_map: dict[str, str], *, stem: str = "model.safetensors") -> None:
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sharded(folder: Path, state: State, *, first: float = 1, second: float = 2) -> dict[str, str]:
    """Two shards with an index: the head in the second, all other tensors in the first."""
    save(folder, SHARDS[0], filled(state, first, without=(HEAD,)))
    save(folder, SHARDS[1], {HEAD: torch.full_like(state[HEAD], second)})
    weight_map = dict.fromkeys(state, SHARDS[0]) | {HEAD: SHARDS[1]}
    save_index(folder, weight_map)
    return weight_map


def single_and_index(folder: Path, state: State) -> None:
    sharded(folder, state)
    save(folder, "model.safetensors", filled(state, 3))


def single_and_stale_index(folder: Path, state: State) -> None:
    save(folder, "model.safetensors", filled(state, 3))
    save_index(folder, dict.fromkeys(state, "model-00001-of-00009.safetensors"))


def shards_of_two_saves(folder: Path, state: State) -> None:
    sharded(folder, state)
    save(folder, "model-00001-of-00001.safetensors", filled(state, 4))


def tensor_in_another_shard(folder: Path, state: State) -> None:
    weight_map = sharded(folder, state)
    save_index(folder, weight_map | {HEAD: SHARDS[0], NORM: SHARDS[1]})


def tensor_in_both_shards(folder: Path, state: State) -> None:
    weight_map = sharded(folder, state)
    save(folder, SHARDS[0], filled(state, 1))
    save_index(folder, weight_map)


def named_in_configuration(folder: Path, state: State) -> None:
    single_and_index(folder, state)
    save(folder, "other.safetensors", filled(state, 5))
    edit(folder / "config.json", transformers_weights="other.safetensors")


def safetensors_and_pickle(folder: Path, state: State) -> None:
    sharded(folder, state)
    save(folder, "pytorch_model.bin", filled(state, 6))


def pickle_and_index(folder: Path, state: State) -> None:
    save(folder, "pytorch_model.bin", filled(state, 6))
    save(folder, "part.bin", filled(state, 7))
    save_index(folder, dict.fromkeys(state, "part.bin"), stem="pytorch_model.bin")


def folder_in_the_way(folder: Path, state: State) -> None:
    (folder / "model.safetensors").mkdir()
    save(folder, "pytorch_model.bin", filled(state, 6))


MIXED = [
    single_and_index,
    single_and_stale_index,
    shards_of_two_saves,
    tensor_in_another_shard,
    tensor_in_both_shards,
    named_in_configuration,
    safetensors_and_pickle,
    pickle_and_index,
    folder_in_the_way,
]


@pytest.mark.parametrize("fill", MIXED, ids=lambda fill: fill.__name__)
def test_mixed_files_as_in_transformers(fill: Callable[..., None], folder: Path, state: State) -> None:
    fill(folder, state)
    theirs = DeepseekVLForConditionalGeneration.from_pretrained(folder).state_dict()
    ours = open_weights(folder)
    for name in (HEAD, EMBEDDING, NORM):
        assert torch.equal(ours[OURS[name]].load(), theirs[name]), name


@pytest.mark.parametrize("head", ["other", "absent"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_as_in_transformers(tied: bool, head: str, folder: Path, state: State) -> None:
    raw = json.loads((folder / "config.json").read_text())
    # transformers 4.57 looks into the language model's part alone, 5 at the top level alone.
    text = {**raw["text_config"], "tie_word_embeddings": tied}
    edit(folder / "config.json", text_config=text, tie_word_embeddings=tied)
    tensors = filled(state, 1, without=(HEAD,)) | {HEAD: torch.full_like(state[HEAD], 4)}
    if head == "absent":
        del tensors[HEAD]
    save(folder, "model.safetensors", tensors)
    if not tied and head == "absent":  # transformers would draw a random one
        assert "no tensor 'lm_head.weight'" in refusal(folder)
        return
    theirs = DeepseekVLForConditionalGeneration.from_pretrained(folder).state_dict()
    if tied and head == "other" and not release.startswith("4."):  # which keeps a head that differs
        assert torch.equal(theirs[HEAD], tensors[HEAD])
        theirs[HEAD] = theirs[EMBEDDING]
    ours = open_weights(folder)
    for name in (HEAD, EMBEDDING):
        assert torch.equal(ours[OURS[name]].load(), theirs[name]), name


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_weights(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_two_shards_that_contradict_the_index_are_refused(folder: Path, state: State) -> None:
    weight_map = sharded(folder, state)
    save(folder, SHARDS[0], filled(state, 1))
    save_index(folder, weight_map | {HEAD: SHARDS[0], NORM: SHARDS[1]})
    save(folder, SHARDS[1], {name: state[name] for name in (HEAD, NORM)})
    message = refusal(folder)
    assert "ambiguous" in message and all(name in message for name in (HEAD, *SHARDS))


def test_missing_shard_names_the_other_weights(folder: Path, state: State) -> None:
    sharded(folder, state)
    (folder / SHARDS[1]).unlink()
    save(folder, "pytorch_model.bin", filled(state, 6))
    message = refusal(folder)
    assert f"{SHARDS[1]}: no such file" in message
    assert "remove model.safetensors.index.json to read pytorch_model.bin" in message


def test_adapter_is_refused_by_name(folder: Path, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA")
    save(folder, "adapter_model.safetensors", {"base_model.lora_A.weight": torch.zeros(2)})
    save(folder, "model.safetensors", state)
    message = refusal(folder)
    assert "ambiguous" in message and "PEFT adapter of 'org/base'" in message and "adapter_config.json" in message
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    assert "PEFT adapter of 'org/base'" in refusal(folder)
    for command in (["inspect", str(folder)], ["convert", "from-hf", str(folder), str(folder / "out")]):
        assert main(command) == 4
        printed = capsys.readouterr().err
        assert "PEFT adapter of 'org/base'" in printed and "merge" in printed
    # peft saves each of several adapters in a folder of its own.
    own = folder / "default"
    own.mkdir()
    (folder / "adapter_config.json").rename(own / "adapter_config.json")
    (folder / "adapter_model.safetensors").unlink()
    for command in (["inspect", str(folder)], ["convert", "from-hf", str(folder), str(folder / "out")]):
        assert main(command) == 4
        assert f"{own}: a PEFT adapter of 'org/base'" in capsys.readouterr().err


def test_unmerged_adapter_is_refused_by_name(folder: Path, state: State) -> None:
    save(folder, "model.safetensors", state | {"model.layers.0.q_proj.lora_A.default.weight": torch.zeros(2)})
    assert "LoRA adapter that is not merged" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "what"),
    [("tf_model.h5", "TensorFlow"), ("model.gguf", "GGUF"), ("model.fp16.safetensors", "another name")],
)
def test_other_weights_are_named(name: str, what: str, folder: Path) -> None:
    (folder / name).write_bytes(b"")
    message = refusal(folder)
    assert name in message and what in message


@pytest.fixture
def cached(folder: Path, state: State, tokenizer_dir: Path, tmp_path: Path) -> Path:
    """The same model as the cache of the Hub keeps it, beside an older snapshot."""
    save(folder, "model.safetensors", state)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    root = tmp_path / "models--org--tiny"
    for name in ("blobs", "refs", "snapshots/older", "snapshots/newest"):
        (root / name).mkdir(parents=True)
    for file in folder.iterdir():
        shutil.move(file, root / "blobs" / file.name)
        (root / "snapshots/newest" / file.name).symlink_to(Path("../../blobs") / file.name)
    (root / "refs/main").write_text("newest")
    return root


def test_cache_of_the_hub_is_read(cached: Path, tmp_path: Path) -> None:
    assert find_weights(cached).path == cached / "snapshots/newest"
    assert find_weights(cached / "snapshots").path == cached / "snapshots/newest"
    assert main(["convert", "from-hf", str(cached), str(tmp_path / "out")]) == 0
    (cached / "refs/main").write_text("gone")
    message = refusal(cached)
    assert "cache of the Hugging Face Hub" in message and "'gone'" in message and "snapshots/older" in message


@pytest.mark.parametrize("module", [native_format, original_format], ids=["native", "original"])
@pytest.mark.parametrize(
    "change", [{}, {"rope_theta": 5e5}, {"rms_norm_eps": 1e-5}, {"max_position_embeddings": 4096}], ids=str
)
def test_only_a_preset_gets_its_name(module: Any, change: dict[str, Any], tokenizer_dir: Path, tmp_path: Path) -> None:
    config = load_model_config("7b", llm=change, image_token_id=3)
    files = module.side_files(config, ids=IDS, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(files["config.json"]))
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    assert read_config(tmp_path)[0].preset == "custom", "the image token is another"
    if module is native_format:
        edit(tmp_path / "config.json", image_token_id=100015)
        assert read_config(tmp_path)[0].preset == ("custom" if change else "7b")
    assert all(f"llm.{key} {value}" in model_name(config) for key, value in change.items())


def test_recipe_of_a_custom_model_loads_again(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[3] / "launch/recipes/tiny/stage1.yaml"
    recipe = load_recipe(path, overrides=["model.preset=tiny-hybrid"])
    text = dump_recipe(recipe).replace("preset: tiny-hybrid", "preset: custom")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").model.llm == recipe.model.llm


@pytest.mark.parametrize("fmt", ["native", "original"])
def test_lists_of_end_ids_are_kept(fmt: str, folder: Path, state: State, tokenizer_dir: Path, tmp_path: Path) -> None:
    save(folder, "model.safetensors", state)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7, 9]}))
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "checkpoint")]) == 0
    assert config_of_checkpoint(resolve(tmp_path / "checkpoint")).eos_token_ids == (1, 7, 9)
    out = tmp_path / "out"
    assert main(["convert", "to-hf", str(tmp_path / "checkpoint"), str(out), "--format", fmt]) == 0
    assert read_config(out)[0].eos_token_ids == (1, 7, 9)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config" if fmt == "native" else "language_config"]["eos_token_id"] == [1, 7, 9]
    if fmt == "native":
        model = DeepseekVLForConditionalGeneration.from_pretrained(out)
        assert model.generation_config.eos_token_id == [1, 7, 9]


@pytest.mark.parametrize("found", [[1, "x"], [1, True], [1, 10**6], [1, -1], [[1], [2]], {"a": 1}, "1", True], ids=str)
def test_damaged_end_ids_are_refused(found: Any, folder: Path, state: State) -> None:
    save(folder, "model.safetensors", state)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    assert "generation_config.json: eos_token_id" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.485, 0.456, 0.406]}, "image_mean: MegaVL has [0.5, 0.5, 0.5] or"),
        ({"image_std": [1.0, 1.0, 1.0]}, "image_std"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"high_res_image_mean": [0.5, 0.5, 0.5]}, "high_res_image_mean: MegaVL has [0.48145466"),
        ({"image_mean": "half"}, "image_mean"),
    ],
    ids=str,
)
def test_other_normalisation_of_images_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    released = native_format.side_files(load_model_config("7b"), ids=IDS, dtype="bfloat16")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(released["preprocessor_config.json"]))
    assert read_config(folder)[0].preset == "tiny-siglip"
    edit(path, **changes)
    with pytest.raises(CheckpointError) as error:
        read_config(folder)
    assert f"{path}: " in str(error.value) and message in str(error.value)
