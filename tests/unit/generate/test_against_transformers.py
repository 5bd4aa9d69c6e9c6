"""`megavl convert verify ... --against transformers`: logits of a model and of its export in transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from launch.bench.engines.random_models import write_tokenizer
from megavl.main.cli import main
from megavl.model import siglip
from tests.unit.generate import models

pytest.importorskip("transformers")
PRESET = "tiny-hybrid"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return models.write_folder(PRESET, tmp_path_factory.mktemp("export") / "hf", tokenizer=tokenizer, fmt="native")


def verify(*words: object) -> int:
    return main(["convert", "verify", *map(str, words), "--against", "transformers"])


@pytest.mark.parametrize("preset", models.PRESETS)
def test_an_export_passes(preset: str, tmp_path: Path, tokenizer: Path, capsys, report_table) -> None:
    checkpoint = models.write_checkpoint(preset, tmp_path / "checkpoints", tokenizer=tokenizer)
    folder = models.write_folder(preset, tmp_path / "hf", tokenizer=tokenizer, fmt="native")
    for words in ((folder,), (checkpoint, folder)):
        assert verify(*words, "--json", tmp_path / "report.json") == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line.partition(",")[0] for line in printed[:3]] == ["text", "one image", "two images"]
        assert all(" logits " in line and line.endswith(", the same") for line in printed[:3])
        found = json.loads((tmp_path / "report.json").read_text())
        report_table(f"{preset}: {printed[-1]}")
        assert found["max_rel_diff"] <= 1e-5 and found["prompts"] == 3 and found["greedy_equal"]


def test_one_changed_weight_fails(exported: Path, tmp_path: Path, tokenizer: Path, capsys) -> None:
    checkpoint = models.write_checkpoint(PRESET, tmp_path / "checkpoints", tokenizer=tokenizer)
    (path,) = exported.glob("*.safetensors")
    kept = path.read_bytes()
    tensors = load_file(path)
    tensors["model.language_model.layers.1.mlp.down_proj.weight"][3, 5] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        assert verify(checkpoint, exported) == 4
    finally:
        path.write_bytes(kept)
    assert "NOT within the tolerance 1e-05" in capsys.readouterr().out


def test_a_mistake_of_the_model_fails(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tanh = SimpleNamespace(**vars(F) | {"gelu": lambda x: F.gelu(x, approximate="tanh")})
    monkeypatch.setattr(siglip, "F", tanh)
    assert verify(exported) == 4
    assert "NOT within" in capsys.readouterr().out


def test_missing_transformers_is_answered(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verify(exported) == 2
    assert "pip install 'megavl[hf]'" in capsys.readouterr().err


def test_wrong_folders_are_answered(exported: Path, tmp_path: Path, tokenizer: Path, capsys) -> None:
    checkpoint = models.write_checkpoint(PRESET, tmp_path / "checkpoints", tokenizer=tokenizer)
    original = models.write_folder(PRESET, tmp_path / "original", tokenizer=tokenizer, fmt="original")
    other = models.write_folder("tiny-siglip", tmp_path / "siglip", tokenizer=tokenizer, fmt="native")
    for words, said in (
        ((checkpoint,), "has no config.json"),
        ((tmp_path / "nothing",), "has no config.json"),
        ((original,), "is in the original format"),
        ((exported, other), "models of different sizes"),
    ):
        assert verify(*words) == 4
        assert said in capsys.readouterr().err


def test_one_model_alone_needs_against(exported: Path, capsys) -> None:
    assert main(["convert", "verify", str(exported)]) == 2
    assert "--against transformers" in capsys.readouterr().err


def test_json_without_use_is_refused_first(tmp_path: Path, exported: Path, capsys) -> None:
    assert main(["convert", "verify", str(exported), str(exported), "--json", str(tmp_path / "x.json")]) == 2
    assert "needs --against transformers" in capsys.readouterr().err
    assert verify(exported, "--json", tmp_path / "none" / "x.json") == 2
    assert "is no directory" in capsys.readouterr().err
