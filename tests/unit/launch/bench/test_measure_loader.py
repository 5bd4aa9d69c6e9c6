"""The program that compares the loader with bare decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.bench.engines.measure_loader import main
from tests.unit.data.corpus_files import make_corpus, make_tokenizer, run_preprocess


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """With images, and without."""
    root = tmp_path_factory.mktemp("measured")
    tokenizer, inputs = make_tokenizer(root / "tokenizer"), make_corpus(root)
    assert run_preprocess(inputs, tokenizer=tokenizer, output=root / "both") == 0
    assert run_preprocess(inputs[:1], tokenizer=tokenizer, output=root / "alone") == 0
    return root / "both", root / "alone"


def test_rates_are_measured(datasets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(datasets[0]), "--rounds", "1", "--steps", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workers"] == 1 and found["images"] > 3
    assert all(found[name] > 0 for name in ("bare_per_s", "loader_per_s", "ratio", "bare_cpu_ms", "rank_cpu_ms"))


def test_mistakes_are_named(datasets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(datasets[1])]) == 3
    assert "holds no sequences with images" in capsys.readouterr().err
    assert main([str(datasets[1] / "nothing")]) == 3
    with pytest.raises(SystemExit):
        main([str(datasets[0]), "--rounds", "0"])
