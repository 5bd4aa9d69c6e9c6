"""Every block is timed in real steps, for all trained parts and recompute; the plan reads the file."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from megavl.main.plan import add_arguments, run
from megavl.planner.hardware.calibration import read_calibration
from megavl.train.profile.calibrate import _differences, calibrate, low
from tests.tiny_run import ROOT, environment, forked

RECIPE = """
model: {preset: tiny-hybrid, llm: {num_layers: 5}}
optimizer: {lr: 1.0e-3}
data: {sources: [{path: nowhere}], tokenizer: nowhere, seq_length: 64, multimodal_fraction: 0.5}
training: {stage: 2, steps: 10, global_batch_size: 4, precision: fp32, threads: 1}
run: {dir: run}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    return file


def test_marks_become_seconds_of_blocks() -> None:
    times = {
        "begin": 0.0,
        "siglip begin": 0.1,
        "siglip end": 1.0,
        "sam begin": 1.0,
        "sam end": 3.0,
        "adaptor begin": 3.0,
        "adaptor end": 3.4,
        "vision": 3.5,
        "embedded": 4.0,
        "layers": 12.0,
        "head": 13.0,
        "head back": 15.0,
        "layers back": 31.0,
        "adaptor back": 32.0,
        "pipeline done": 35.0,
    }
    found = _differences(list(times.items()), layers=4)
    assert found == pytest.approx(
        {
            "towers forward": 3.0,
            "adaptor forward": 0.5,
            "embedding forward": 0.5,
            "layer forward": 2.0,
            "head forward": 1.0,
            "head backward": 2.0,
            "layer backward": 4.0,
            "embedding backward": 1.0,
            "towers backward": 3.0,
            "siglip forward": 0.9,
            "sam forward": 2.0,
        }
    )
    blocks = {name: seconds for name, seconds in found.items() if not name.startswith(("siglip", "sam"))}
    whole = sum(seconds * (4 if "layer" in name else 1) for name, seconds in blocks.items())
    assert whole == pytest.approx(35.0), "nothing is lost"


def test_a_step_without_images_has_no_vision() -> None:
    names = ("begin", "embedded", "layers", "head", "head back", "layers back", "pipeline done")
    found = _differences([(name, float(at)) for at, name in enumerate(names)], layers=1)
    assert found["towers forward"] == found["adaptor forward"] == found["towers backward"] == 0


def test_the_lower_quartile_ignores_what_others_add() -> None:
    assert low([1.0, 1.1, 1.0, 9.0, 1.2, 7.0, 1.1, 1.0]) < 1.05
    assert low([3.0]) == 3.0
    assert 1.0 <= low([1.0, 2.0]) < 2.0, "never below what was measured"


def test_steps_that_train_nothing_have_no_backward() -> None:
    borders = [("begin", 0.0), ("embedded", 1.0), ("layers", 3.0), ("head", 4.0), ("pipeline done", 4.5)]
    found = _differences(borders, layers=2)
    assert (found["layer forward"], found["head forward"]) == (1.0, 1.0)
    assert all(seconds == 0 for name, seconds in found.items() if "backward" in name)


@pytest.mark.parametrize(
    ("overrides", "trains_towers"),
    [
        (["training.stage=3"], True),
        (["training.stage=2", "recompute.granularity=full"], True),
        (["training.train=[adaptor]", "recompute.granularity=selective"], False),
    ],
    ids=["stage 3", "full recompute", "adaptor alone"],
)
def test_every_block_gets_its_seconds(path: Path, overrides: list[str], trains_towers: bool) -> None:
    recipe = load_recipe(path, overrides=overrides)
    found = calibrate(recipe, images=2, repeats=2)
    assert found is not None
    assert found.data == "synthetic"
    (entry,) = found.entries
    assert (entry.tensor, entry.processes, entry.images, entry.transfer_s) == (1, 1, 2.0, None)
    assert entry.multimodal is not None and entry.vision is not None and entry.one_image is not None
    for kind in (entry.text, entry.multimodal):
        # Text reaches the adaptor only through the dummy image of overlapped reduction, which is off here.
        back = kind is entry.multimodal or "llm" in recipe.trainable_parts
        for block in (kind.layer, kind.head):
            assert 0 < block.forward < 10 and (0 < block.backward < 10) == back
        assert kind.embedding.forward > 0
    assert entry.vision.towers.forward > 0 and entry.vision.adaptor.forward > 0
    assert (entry.vision.towers.backward > 0) == trains_towers
    assert set(entry.towers) == {"sam", "siglip"}
    assert sum(entry.towers.values()) <= entry.vision.towers.forward * 1.5
    assert entry.update_s_per_parameter > 0 and entry.step_s > 0


def test_plan_reads_the_file_of_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file = str(path.with_name("c.json"))
    env = forked(environment())
    command = [env["PYTHON_EXEC"], "-m", "megavl", "plan", str(path), "--calibrate", file, "--repeats", "2"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "tensor 1, 1 processes" in done.stdout
    assert len(read_calibration(file).entries) == 1
    assert run(parser.parse_args([str(path), "--calibration", file, "--device", "cpu", "--json"])) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["text"]["seconds"] > 0
    assert raw["times"] == f"measurements in {file}"
    with pytest.raises(UsageError, match="was measured for seq_length 64"):
        run(parser.parse_args([str(path), "data.seq_length=128", "--calibration", file]))
    with pytest.raises(UsageError, match="was measured for trained"):
        run(parser.parse_args([str(path), "training.stage=3", "--calibrate", file]))
    with pytest.raises(UsageError, match="--repeats: 1"):
        run(parser.parse_args([str(path), "--calibrate", file, "--repeats", "1"]))
