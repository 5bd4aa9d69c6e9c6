"""A conversion that is killed leaves nothing that looks like a checkpoint, and the next one clears what is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megavl.checkpoint.reader import open_model_tensors, resolve
from megavl.config.errors import CheckpointError
from megavl.convert.hf_read import read_config
from megavl.main.cli import main
from megavl.weights.canonical_names import canonical_shapes
from tests import fork_server
from tests.tiny_run import environment
from tests.unit.convert import public_models

# Kills itself at the first call of a function, after a number of calls that go through.
SCRIPT = """
import importlib, os, signal, sys
target, count, *words = sys.argv[1:]
module, _, name = target.rpartition(".")
owner, _, method = module.rpartition(".")
holder = getattr(importlib.import_module(owner), method) if method[0].isupper() else importlib.import_module(module)
inner, left = getattr(holder, name), [int(count)]
def killing(*args, **kwargs):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return inner(*args, **kwargs)
setattr(holder, name, killing)
from megavl.main.cli import main
sys.exit(main(words))
"""
AMID_TENSORS = ("megavl.files.file_series.FileSeries.write", 3000)
BEFORE_MANIFEST = ("megavl.checkpoint.commit.write_manifest", 0)
BEFORE_RENAME = ("megavl.checkpoint.commit.publish", 0)


@pytest.fixture
def from_hf(sources, tokenizer_dir, tmp_path):
    folder = Path(shutil.copytree(sources["tiny-siglip"], tmp_path / "hf"))
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder)
    return ["convert", "from-hf", str(folder), str(tmp_path / "out")]


@pytest.fixture
def init(tokenizer_dir, tmp_path):
    public = public_models.build(tmp_path / "public", tokenizer_dir)
    words = ["--llm", public.llm_paths["bin"], "--siglip", public.siglip_paths["timm"], "--preset", "tiny-siglip"]
    return ["convert", "init", *map(str, words), str(tmp_path / "out")]


def killed(words, target, count):
    variables = environment()
    command = [fork_server.python(variables), "-c", SCRIPT, target, str(count), *words]
    return subprocess.run(command, env=variables, timeout=1800, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "target"),
    [("from_hf", AMID_TENSORS), ("from_hf", BEFORE_RENAME), ("init", BEFORE_MANIFEST)],
    ids=["from-hf amid the tensors", "from-hf before the rename", "init before the manifest"],
)
def test_killed_conversion_leaves_no_checkpoint(command, target, request, tmp_path, capsys):
    words, out = request.getfixturevalue(command), tmp_path / "out"
    done = killed(words, *target)
    assert done.returncode == -9, done.stderr
    owner, left = sorted(out.iterdir(), key=lambda path: path.is_dir())
    assert owner.name == "owner-1.json"
    assert left.name.startswith("iter_0000000.tmp-") and any(left.glob("*.distcp"))
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        resolve(out)
    assert main(["inspect", str(out)]) == 4 and "no valid checkpoint" in capsys.readouterr().err
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == ["iter_0000000", "latest"]
    config = read_config(tmp_path / "hf")[0] if command == "from_hf" else None
    if config is not None:
        assert open_model_tensors(out).keys() == canonical_shapes(config).keys()


@pytest.mark.parametrize("fmt", ["native", "original"])
def test_damage_found_by_hash_ends_an_export(from_hf, tmp_path, capsys, fmt):
    """The checkpoint is hashed while it is converted: whatever was written by then goes away."""
    assert main(from_hf) == 0
    (shard,) = (tmp_path / "out" / "iter_0000000").glob("*.distcp")
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    capsys.readouterr()
    assert main(["convert", "to-hf", str(tmp_path / "out"), str(tmp_path / "export"), "--format", fmt]) == 4
    assert f"{shard}: sha256" in (message := capsys.readouterr().err) and "damaged" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
