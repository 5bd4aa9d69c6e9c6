"""MegaVL as a library: the README's code runs as written, and a caller's mistakes are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megavl.config.errors import DataError, UsageError
from megavl.config.recipe import ParallelConfig
from megavl.generate.pretrained import Model, Processor
from megavl.generate.sampling import Sampling
from megavl.main.cli import main
from tests.tiny_run import environment
from tests.unit.generate import models

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "megavl/generate/README.md"
DEMO_IMAGE = "runs/demo/corpus/images/heldout/shape-name-0000.png"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README names."""
    root = tmp_path_factory.mktemp("demo")
    seed = models.TALKATIVE["tiny-hybrid"]
    model = root / "runs/demo/hf_native"
    model.parent.mkdir(parents=True)
    models.write_folder("tiny-hybrid", model, tokenizer=tokenizer_dir, fmt="native", seed=seed)
    for name in (DEMO_IMAGE, "photo.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        models.write_picture(root / name, seed=7)
    return root


@pytest.fixture(scope="module")
def model(tokenizer) -> Iterator[Model]:
    with models.built("tiny-hybrid", seed=models.TALKATIVE["tiny-hybrid"]) as stage:
        yield Model(stage, Processor(models.config_of("tiny-hybrid"), tokenizer))


def run_snippet(code: str, *, folder: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_five_lines_answer_without_any_warning(folder, capsys):
    code, *_ = SNIPPETS
    assert code in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    shown = run_snippet(code, folder=folder)
    words = ["--image", str(folder / DEMO_IMAGE), "--prompt", "Which shape is it?"]
    words += ["--max-new-tokens", "64", "--json"]
    assert main(["generate", str(folder / "runs/demo/hf_native"), "--device", "cpu", *words]) == 0
    assert shown == json.loads(capsys.readouterr().out)["text"] + "\n"


@pytest.mark.slow
def test_readme_code_of_batches_and_streams_runs(folder):
    shown = run_snippet(SNIPPETS[1], folder=folder)
    assert len(re.findall(r"^\d+ \((?:\d+, ){5,}\d+,?\) ", shown, re.MULTILINE)) == 2


@pytest.mark.slow
def test_readme_code_of_scores_runs(folder):
    shown = run_snippet(SNIPPETS[2], folder=folder)
    assert len(re.findall(r"^-\d+\.\d+ \d+ (?:True|False) \d+\.\d+$", shown, re.MULTILINE)) == 2


def test_images_and_messages_give_one_prompt(model, picture):
    text = "<image_placeholder>red?"
    ways = [
        model.processor(text, images=[picture]),
        model.processor("red?", images=[Image.open(picture)]),
        model.processor([{"role": "user", "content": text, "images": [str(picture)]}]),
        model.processor(
            [{"role": "User", "content": "red?", "images": [picture]}, {"role": "Assistant", "content": ""}]
        ),
    ]
    assert all(way.ids == ways[0].ids and way.images.equal(ways[0].images) for way in ways)


def test_batch_answers_come_in_order(model, picture):
    questions = [("red?", [picture]), ("which colour?", []), ("green or blue?", [picture, picture]), ("why?", [])]
    inputs = [model.processor(text, images=images) for text, images in questions]
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=3)
    alone = [model.generate(one, max_new_tokens=9, sampling=sampling) for one in inputs]
    assert list(model.generate_batch(inputs, max_new_tokens=9, sampling=sampling, batch_size=2)) == alone
    assert [answer.prompt_tokens for answer in alone] == [len(one.ids) for one in inputs]
    assert all(1 <= len(answer.token_ids) <= 9 for answer in alone) and len({a.token_ids for a in alone}) == 4


def test_stream_pieces_join_to_the_answer(model, picture):
    inputs = model.processor("which colour?", images=[picture])
    pieces = list(model.stream(model.request(inputs, max_new_tokens=20)))
    assert "".join(pieces) == model.generate(inputs, max_new_tokens=20).text
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "bot", "content": "x"}], "message 1: .* is not understood"),
        ([{"role": "user", "content": None}], "message 1: .* is not understood"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "user"),
        ([{"role": "user", "content": "<image_placeholder>"}], "has 1 <image_placeholder>, but 0 images"),
    ],
)
def test_malformed_conversations_are_refused(model, messages, message):
    with pytest.raises(DataError, match=message):
        model.processor(messages)


def test_unfit_requests_are_refused(model, picture):
    inputs = model.processor("red?")
    with pytest.raises(DataError, match=f"{len(inputs.ids)} prompt tokens and 4096 after them exceed the model's 4096"):
        model.generate(inputs, max_new_tokens=4096)
    with pytest.raises(UsageError, match="max_new_tokens: 0 must be at least 1"):
        model.generate(inputs, max_new_tokens=0)
    with pytest.raises(UsageError, match="brings its images in its messages"):
        model.processor([{"role": "user", "content": "x"}], images=[picture])
    with pytest.raises(UsageError, match="WORLD_SIZE is 1, but tensor 2 x pipeline 1 takes 2"):
        Model.load("nowhere", parallel=ParallelConfig(tensor=2))
