"""`megavl chat` as a process, driven through pipes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.bench.engines.random_models import write_tokenizer
from megavl.generate.pretrained import Model, Processor
from tests.tiny_run import ROOT, environment, forked
from tests.unit.generate import models

PRESET = "tiny-hybrid"
SEED = models.TALKATIVE[PRESET]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    tokenizer = write_tokenizer(root / "tokenizer")
    return models.write_folder(PRESET, root / "hf", tokenizer=tokenizer, fmt="native", seed=SEED)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pictures with spaces")
    return [models.write_picture(root / f"{i} a.png", seed=60 + i) for i in range(2)]


def talk(folder: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    env = forked(environment() | {"PYTHONUTF8": "1"})
    command = [env["PYTHON_EXEC"], "-W", "ignore", "-m", "megavl", "chat", str(folder), "--device", "cpu"]
    return subprocess.run(
        [*command, "--max-new-tokens", "16"],
        input="".join(line + "\n" for line in lines),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def expected_answers(folder: Path, conversations: list[list[tuple[str, list[Path]]]]) -> list[str]:
    """The model's answer to each turn when it reads the whole conversation from scratch."""
    answers = []
    with models.built(PRESET, seed=SEED) as stage:
        from megavl.data.tokenizer import open_tokenizer

        model = Model(stage, Processor(models.config_of(PRESET), open_tokenizer(folder)))
        for turns in conversations:
            messages: list[dict[str, object]] = []
            for text, images in turns:
                messages.append({"role": "user", "content": text, "images": images})
                answers.append(model.generate(model.processor(messages), max_new_tokens=16).text.strip())
                messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_chat_answers_turns_and_survives_mistakes(folder, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:200])
    lines = [
        "which colour?",
        "/image /nowhere/lost.png",
        f"/image {broken}",
        f"/image {pictures[0]}",
        f"/image {pictures[1]}",
        "<image_placeholder> one place only",
        "is it <image_placeholder> or <image_placeholder>?",
        "why?",
        "/reste",
        "/reset",
        "",
        f"/image {pictures[1]}",
        "red?",
        "/exit",
        "never read",
    ]
    run = talk(folder, lines)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    first = [("which colour?", []), ("is it <image_placeholder> or <image_placeholder>?", pictures), ("why?", [])]
    expected = expected_answers(folder, [first, [("red?", pictures[1:])]])
    assert run.stdout.rstrip("\n") == "\n".join(answer or "(no answer)" for answer in expected)
    assert len({answer for answer in expected if answer}) > 2
    told = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    marks = ["/nowhere/lost.png", str(broken), "has 1 <image_placeholder>, but 2 images are given", "/reste"]
    assert [mark in line for mark, line in zip(marks, told, strict=True)] == [True] * 4


def test_end_of_input_ends_the_chat(folder):
    run = talk(folder, ["/help"])
    assert run.returncode == 0 and "/image PATH" in run.stdout and "error" not in run.stderr


def test_missing_model_is_named(tmp_path):
    run = talk(tmp_path / "nothing", ["red?"])
    told = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode == 4 and len(told) == 1 and str(tmp_path / "nothing") in told[0]
    assert run.stdout == "" and "Traceback" not in run.stderr
