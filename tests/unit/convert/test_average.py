"""`megavl convert average`: the mean of the weights of checkpoints of one model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavl.checkpoint.reader import open_model_tensors
from megavl.convert.open_weights import open_weights
from megavl.main.cli import main


def convert(*words):
    return main(["convert", *map(str, words)])


def changed(source, out, change):
    """A copy of a Hugging Face folder with other weights."""
    folder = Path(shutil.copytree(source, out))
    tensors = {name: change(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(sources, tokenizer_dir, tmp_path_factory):
    """Three models with weights w, w + 1 and 3 w."""
    base = tmp_path_factory.mktemp("average")
    first = changed(sources["tiny-siglip"], base / "w", lambda tensor: tensor)
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, first)
    return [first, changed(first, base / "w1", lambda t: t + 1), changed(first, base / "w3", lambda t: 3 * t)]


def test_the_mean_of_three_models(folders, tmp_path, capsys):
    assert convert("average", *folders, tmp_path / "out") == 0
    assert "mean of 3 models" in capsys.readouterr().out
    models = [open_weights(folder) for folder in folders]
    mean = open_model_tensors(tmp_path / "out")
    assert mean.keys() == models[0].keys()
    for name, tensor in mean.items():
        expected = sum(model[name].load().double() for model in models) / 3
        assert torch.equal(tensor.load(), expected.float()), name
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"model 2 from {folders[1]}" in capsys.readouterr().out


def test_checkpoints_and_other_types(folders, tmp_path):
    assert convert("from-hf", folders[0], tmp_path / "checkpoints") == 0
    half = changed(folders[1], tmp_path / "half", lambda tensor: tensor.bfloat16())
    assert convert("average", tmp_path / "checkpoints", half, tmp_path / "out") == 0
    one, two, mean = (open_weights(path) for path in (folders[0], half, tmp_path / "out"))
    for name, tensor in mean.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.load(), ((one[name].load().double() + two[name].load()) / 2).float()), name


def test_the_newest_checkpoints_of_a_run(folders, tmp_path, caplog):
    run = tmp_path / "run"
    for step, folder in enumerate(folders):
        assert convert("from-hf", folder, run / f"start-{step}") == 0
        renumber(run / f"start-{step}" / "iter_0000000", run / f"iter_{step + 1:07d}", step + 1)
    shard = next((run / "iter_0000003").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert convert("average", run, tmp_path / "out", "--newest", 2) == 0
    assert "iter_0000003" in caplog.text and "left out" in caplog.text
    assert convert("average", folders[0], folders[1], tmp_path / "expected") == 0
    assert convert("verify", tmp_path / "out", tmp_path / "expected") == 0


def renumber(source, target, step):
    """Move a checkpoint to another iteration."""
    from megavl.checkpoint import commit
    from megavl.checkpoint.manifest import MANIFEST, read_manifest

    manifest = read_manifest(source)
    source.rename(target)
    (target / MANIFEST).unlink()
    commit.write_manifest(target, iteration=step, world_size=1, content=manifest["content"], records=manifest["files"])


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("w OUT", 2, "one model; give two or more"),
        ("w w1 w OUT", 2, "given twice"),
        ("w w1 OUT --newest 2", 2, "needs one directory of checkpoints, not 2"),
        ("w OUT --newest 1", 2, "must be at least 2"),
        ("w OUT --newest 2", 4, "holds 0 good checkpoints, 2 are wanted: a Hugging Face folder"),
        ("run OUT --newest 2", 4, "its checkpoints are in"),
        ("missing OUT --newest 2", 4, "missing: no such directory"),
        ("w w1 w3", 2, "is itself a model, it has a config.json"),
        ("w w1 checkpoint", 2, "is itself a model, it has a manifest.json"),
        ("w w1 run/checkpoints", 2, "holds a run's checkpoints, such as iter_0000001"),
        ("w missing OUT", 4, "no such directory"),
        ("w hybrid OUT", 2, "only checkpoints of one model"),
        ("w other_tokenizer OUT", 2, "its tokenizer differs"),
    ],
)
def test_refusals_leave_nothing(words, code, expected, folders, sources, tokenizer_dir, tmp_path, capsys):
    hybrid = Path(shutil.copytree(sources["tiny-hybrid"], tmp_path / "hybrid"))
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, hybrid)
    other = Path(shutil.copytree(folders[0], tmp_path / "other_tokenizer"))
    file = other / "tokenizer.json"
    file.write_text(swapped(file.read_text()))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert convert("from-hf", folders[0], checkpoints) == 0
    renumber(checkpoints / "iter_0000000", checkpoints / "iter_0000001", 1)
    paths = {folder.name: folder for folder in [*folders, hybrid, other]} | {"OUT": tmp_path / "out"}
    paths |= {"run": tmp_path / "run", "run/checkpoints": checkpoints, "checkpoint": checkpoints / "iter_0000001"}
    before = {path for folder in (*folders, tmp_path) for path in folder.rglob("*")}
    assert convert("average", *(paths.get(word, word) for word in words.split())) == code
    assert expected in capsys.readouterr().err
    assert {path for folder in (*folders, tmp_path) for path in folder.rglob("*")} == before


@pytest.mark.parametrize("words", ["from-hf w OUT", "init OUT --llm w --siglip w --preset 1b"])
def test_no_model_is_written_into_another(words, folders, tmp_path, capsys):
    assert convert("from-hf", folders[0], tmp_path / "out") == 0
    paths = {"w": folders[0], "OUT": tmp_path / "out/iter_0000000"}
    assert convert(*(paths.get(word, word) for word in words.split())) == 2
    assert "is itself a model" in capsys.readouterr().err
    assert not (paths["OUT"] / "iter_0000000").exists()


def swapped(text):
    """A tokenizer in which two tokens have each other's id."""
    import json

    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    return json.dumps(content)
