"""The shipped ablations with two steps a run: one queue of all seven, killed and continued, and mistakes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_run import PATIENCE_S, ROOT, environment

FOLDER = ROOT / "launch/ablations"
SHIPPED = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "base.yaml")
CODES = {75, 130, -9}
"""Of a command that a signal has ended."""
KEPT = ("corpus full", "data set captions", "data set conversations", "ancestor decoder", "ancestor siglip")
"""Tasks of Figure 8 that the test of kills takes over; it makes two data sets and four runs anew."""
ENDINGS = ("json", "svg")
"""Files that may not differ; the page names hours."""


def command(work: Path, *files: Path) -> list[str]:
    words = [sys.executable, "-W", "ignore", "launch/ablate.py", *map(str, files)]
    return [*words, "--smoke", "--jobs", "2", "--cache", str(work / "cache"), "--out", str(work / "out")]


def ablate(work: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(work, *files),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def begin(work: Path, *files: Path) -> subprocess.Popen[bytes]:
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command(work, *files), cwd=ROOT, env=environment(), stdout=nothing, stderr=nothing)


def wait_for(work: Path, *, count: int, kind: str) -> None:
    """Return when so many tasks of a kind are done."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if len(list(work.glob(f"cache/{kind}-*/done.json"))) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"not {count} tasks {kind} after {PATIENCE_S} s")


def results(work: Path, name: str) -> dict[str, bytes]:
    return {ending: (work / f"out/{name}.{ending}").read_bytes() for ending in ENDINGS}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven ablations from one queue."""
    work = tmp_path_factory.mktemp("ablations")
    done = ablate(work, *SHIPPED)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return work


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_smoke_writes_every_result(smoke: Path, path: Path) -> None:
    content = json.loads((smoke / f"out/{path.stem}.json").read_text())
    raw = yaml.safe_load(path.read_text())
    assert set(content["arms"]) == set(raw["arms"]) and content["seeds"] == [1]
    assert [claim["text"] for claim in content["claims"]] == [claim["text"] for claim in raw["claims"]]
    page = (smoke / f"out/{path.stem}.md").read_text()
    assert all(claim["verdict"] in page for claim in content["claims"])
    for arm in content["arms"].values():
        assert arm["tokens"] > 0
        for measure in arm["measures"].values():
            assert measure["values"] == [measure["mean"]] and measure["n"] == 1


def test_done_ablation_runs_nothing(smoke: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke.glob("cache/*/done.json")}
    held = results(smoke, "table10")
    assert ablate(smoke, FOLDER / "table10.yaml").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in smoke.glob("cache/*/done.json")} == before
    assert results(smoke, "table10") == held


@pytest.mark.slow
def test_killed_and_continued_gives_the_same(smoke: Path, tmp_path: Path) -> None:
    path = FOLDER / "figure8.yaml"
    for done in smoke.glob("cache/*/done.json"):
        if json.loads(done.read_text())["name"] in KEPT:
            shutil.copytree(done.parent, tmp_path / "cache" / done.parent.name)
    process = begin(tmp_path, path)
    wait_for(tmp_path, count=3, kind="dataset")
    process.terminate()
    assert process.wait(PATIENCE_S) == 75
    process = begin(tmp_path, path)
    wait_for(tmp_path, count=4, kind="train")
    process.kill()
    assert process.wait() == -9
    done = ablate(tmp_path, path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert results(tmp_path, "figure8") == results(smoke, "figure8")


@pytest.mark.slow
def test_five_random_kills_change_no_number(smoke: Path, tmp_path: Path) -> None:
    """Moments are drawn from the time that an undisturbed run needs."""
    path, draw = FOLDER / "figure9.yaml", random.Random(1)
    for _ in range(5):
        process = begin(tmp_path, path)
        time.sleep(draw.uniform(0.5, 25))
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        # A run that needs less than the moments drawn may have ended.
        assert process.wait(PATIENCE_S) in {*CODES, 0}
    done = ablate(tmp_path, path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert results(tmp_path, "figure9") == results(smoke, "figure9")


def checkpoints(work: Path, *, steps: int) -> list[Path]:
    """Checkpoints of runs of so many steps that lie between start and end."""
    found = []
    for recipe in work.glob("cache/train-*/recipe.yaml"):
        if f"steps: {steps}\n" in recipe.read_text():
            found += sorted(recipe.parent.glob("run/checkpoints/iter_*[0-9]/manifest.json"))
    return [path for path in found if 0 < int(path.parent.name.removeprefix("iter_")) < steps]


@pytest.mark.slow
def test_run_killed_at_a_checkpoint_goes_on(tmp_path: Path) -> None:
    """The runs of stage 2 are killed between checkpoints, so that they go on from one of their own."""
    steps = 12
    smoke = {"seeds": 1, "set": {"checkpoint.interval": 2}, "stages": {"stage2": {"training.steps": steps}}}
    path = changed(tmp_path, sizes={"smoke": smoke})
    plain = ablate(tmp_path / "plain", path)
    assert plain.returncode == 0, plain.stdout[-3000:] + plain.stderr[-3000:]
    process = begin(tmp_path / "killed", path)
    end = time.monotonic() + PATIENCE_S
    while not (found := checkpoints(tmp_path / "killed", steps=steps)):
        assert time.monotonic() < end and process.poll() is None, "no run was seen between its checkpoints"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9
    run = found[0].parents[2]
    assert not (run.parent / "done.json").exists(), "the run had ended"
    again = ablate(tmp_path / "killed", path)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "resuming after step" in (run.parent / "log.txt").read_text()
    assert results(tmp_path / "killed", "changed") == results(tmp_path / "plain", "changed")


def changed(folder: Path, **changes: Any) -> Path:
    raw = {**yaml.safe_load((FOLDER / "figure8.yaml").read_text()), "base": str(FOLDER / "base.yaml"), **changes}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_failed_task_is_named_with_its_code(tmp_path: Path) -> None:
    done = ablate(tmp_path, changed(tmp_path, sizes={"smoke": {"corpora": {"full": ["--samples", "0"]}}}))
    assert done.returncode == 2
    assert "corpus full ended with code 2: " in done.stderr and "'0' is out of range" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_wrong_file_is_refused_at_once(tmp_path: Path) -> None:
    done = ablate(tmp_path, changed(tmp_path, seeds=0))
    assert done.returncode == 2 and "changed.yaml: seeds: found 0" in done.stderr
    assert not (tmp_path / "cache").exists()
