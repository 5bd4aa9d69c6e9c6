"""Files of many prompts: `megavl generate --prompts` from the outside, and one message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavl.generate.prompts_file import read_prompts
from megavl.main.cli import main
from tests.unit.generate import models

PRESET = "tiny-hybrid"


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "native"
    return models.write_folder(PRESET, out, tokenizer=tokenizer_dir, fmt="native", seed=models.TALKATIVE[PRESET])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    for number in range(3):
        models.write_picture(tmp_path / f"{number}.png", seed=number)
    lines = [
        {"id": "a", "prompt": "which colour?"},
        {"id": 7, "prompt": "<image_placeholder>red or <image_placeholder>?", "images": ["0.png", "1.png"]},
        {"prompt": "green\u2028or blue?", "system": "", "images": [str(tmp_path / "2.png")]},
        {"prompt": "which colour?", "seed": 5},
        {"prompt": "which colour?", "seed": 5},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n" + "".join(json.dumps(line, ensure_ascii=False) + "\n\n" for line in lines), encoding="utf-8")
    return path


def ask(model: Path, *words: str) -> int:
    return main(["generate", str(model), "--device", "cpu", "--max-new-tokens", "8", *words])


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answers_are_those_of_single_questions(folder, questions, capsys):
    sampling = ("--temperature", "1.0", "--top-k", "40", "--top-p", "0.95", "--repetition-penalty", "1.2")
    assert ask(folder, "--prompts", str(questions), *sampling, "--seed", "2", "--batch-size", "2") == 0
    found = rows(capsys)
    assert [row.pop("id", None) for row in found] == ["a", 7, None, None, None]
    assert [list(row) for row in found] == [["prompt_tokens", "token_ids", "text"]] * 5
    for row, prompt in zip(found, read_prompts(questions), strict=True):
        words = [word for image in prompt.images for word in ("--image", str(image))]
        words += [] if prompt.system is None else ["--system", prompt.system]
        seed = ("--seed", str(2 if prompt.seed is None else prompt.seed))
        assert ask(folder, "--prompt", prompt.text, *words, *sampling, *seed, "--json") == 0
        assert rows(capsys) == [row]
    assert found[3] == found[4] != found[0]


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "questions.jsonl:2: "),
        ("[]", "questions.jsonl:2: "),
        ('{"images": []}', "questions.jsonl:2: prompt: "),
        ('{"prompt": 3}', "questions.jsonl:2: prompt: "),
        ('{"prompt": "x", "image": ["a.png"]}', "questions.jsonl:2: image: unknown key; did you mean 'images'?"),
        ('{"prompt": "x", "seed": -1}', "questions.jsonl:2: seed: "),
        ('{"prompt": "x", "images": ["gone.png"]}', "gone.png does not exist"),
        ('{"prompt": "<image_placeholder>"}', "questions.jsonl:2: the prompt has 1 <image_placeholder>, but 0 images"),
        ('{"prompt": "x", "images": ["broken.png"]}', "questions.jsonl:2: "),
        (json.dumps({"prompt": "red " * 5000}), "questions.jsonl:2: "),
    ],
)
def test_malformed_line_is_named(folder, tmp_path, capsys, line, message):
    (tmp_path / "broken.png").write_bytes(models.write_picture(tmp_path / "a.png", seed=1).read_bytes()[:100])
    path = tmp_path / "questions.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    assert ask(folder, "--prompts", str(path)) == 3
    assert message in refused(capsys)


def test_files_without_prompts_are_refused(folder, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    for name in ("empty.jsonl", "latin.jsonl", "gone.jsonl"):
        assert ask(folder, "--prompts", str(tmp_path / name)) == 3
        assert name in refused(capsys)


def test_contradicting_options_are_refused(folder, questions, capsys):
    for words, message in [
        ((), "either --prompt"),
        (("--prompt", "x", "--prompts", str(questions)), "either --prompt"),
        (("--prompts", str(questions), "--image", "a.png"), "--image: it belongs to --prompt"),
        (("--prompts", str(questions), "--batch-size", "0"), "--batch-size: 0"),
        (("--prompt", "x", "--tensor", "0"), "--tensor: 0"),
        (("--prompt", "x", "--tensor", "2"), "WORLD_SIZE is 1"),
        (("--prompt", "x", "--layout", "a"), "--layout: 'a'"),
        (("--prompt", "x", "--layout", "3"), "does not share out 4 layers"),
        (("--prompt", "x", "--top-k", "3"), "--top-k: it has no effect on greedy decoding"),
        (("--prompt", "x", "--temperature", "nan"), "--temperature: nan"),
        (("--prompt", "x", "--temperature", "1", "--top-p", "0"), "--top-p: 0.0"),
        (("--prompt", "x", "--repetition-penalty", "0"), "--repetition-penalty: 0.0"),
        (("--prompt", "x", "--seed", "-1"), "--seed: -1"),
    ]:
        assert ask(folder, *words) == 2
        assert message in refused(capsys)
