"""`megavl generate` and `evaluate` under torchrun give what one process gives (fp32, real gloo processes)."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.bench.engines.random_models import write_tokenizer
from megavl.main.cli import main
from tests.tiny_run import environment, forked, free_port
from tests.unit.evaluate.benchmarks import published
from tests.unit.generate import models

ROOT = Path(__file__).resolve().parents[2]
TOKENS = ("--max-new-tokens", "24")
LAYOUTS = {
    "tp2": ("--tensor", "2"),
    "pp2": ("--pipeline", "2"),
    "pp2 0+4": ("--pipeline", "2", "--layout", "0,4"),
    "tp2 pp2": ("--tensor", "2", "--pipeline", "2"),
}


@dataclass(frozen=True)
class Family:
    """A tiny model on disk, questions for it, and what one process answers."""

    models: dict[str, Path]
    """Model folders by kind."""
    prompts: Path
    pictures: list[Path]
    answers: list[dict[str, Any]]
    """Answers to the lines of `prompts`, each asked alone."""


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp(request.param)
    tokenizer, seed = write_tokenizer(root / "tokenizer"), models.TALKATIVE[request.param]
    folders = {
        fmt: models.write_folder(request.param, root / fmt, tokenizer=tokenizer, fmt=fmt, seed=seed)
        for fmt in ("native", "original")
    }
    folders["checkpoint"] = models.write_checkpoint(request.param, root / "run", tokenizer=tokenizer, seed=seed)
    pictures = [models.write_picture(root / f"{i}.png", seed=40 + i) for i in range(3)]
    questions = [
        {"id": "text", "prompt": "Which colour is it, and why?"},
        {"id": "one", "prompt": "which colour?", "images": ["0.png"]},
        {"id": "three", "prompt": "<image_placeholder>red <image_placeholder>or <image_placeholder>?"}
        | {"images": ["0.png", "1.png", "2.png"]},
    ]
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    answers = [alone(folders["native"], question, root=root) for question in questions]
    return Family(models=folders, prompts=prompts, pictures=pictures, answers=answers)


def alone(model: Path, question: dict[str, Any], *, root: Path) -> dict[str, Any]:
    """One question to one process."""
    images = [word for name in question.get("images", ()) for word in ("--image", str(root / name))]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command = ["generate", str(model), "--device", "cpu", "--prompt", question["prompt"], *images]
        assert main([*command, *TOKENS, "--json"]) == 0
    answer: dict[str, Any] = json.loads(out.getvalue())
    return answer


def on_ranks(layout: str, model: Path, *words: str, what: str = "generate") -> subprocess.CompletedProcess[str]:
    """A command on as many processes as the layout takes."""
    options = LAYOUTS[layout]
    processes = math.prod(int(value) for name, value in zip(options[::2], options[1::2]) if name != "--layout")
    launcher = ("-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(processes))
    port = ("--master-port", str(free_port()))
    command = ("-m", "megavl", what, str(model), "--device", "cpu", *options, *words)
    env = forked(environment())
    return subprocess.run(
        [env["PYTHON_EXEC"], *launcher, *port, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def answers_of(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


CASES = [
    ("tiny-hybrid", "tp2", "native"),
    ("tiny-hybrid", "pp2", "checkpoint"),
    ("tiny-siglip", "tp2", "checkpoint"),
    ("tiny-siglip", "pp2", "native"),
    *(
        pytest.param(preset, layout, kind, marks=pytest.mark.slow)
        for preset, layout, kind in (
            ("tiny-hybrid", "tp2", "checkpoint"),
            ("tiny-hybrid", "pp2", "native"),
            ("tiny-siglip", "tp2", "native"),
            ("tiny-siglip", "pp2", "checkpoint"),
            ("tiny-hybrid", "pp2 0+4", "original"),
            ("tiny-hybrid", "tp2 pp2", "checkpoint"),
            ("tiny-siglip", "tp2 pp2", "original"),
        )
    ),
]


@pytest.mark.parametrize(("family", "layout", "kind"), CASES, indirect=["family"])
def test_tokens_do_not_depend_on_the_layout(family, layout, kind, report_table):
    """Three prompts together, with no, one and three images; every answer is that of one process asked alone."""
    found = answers_of(on_ranks(layout, family.models[kind], "--prompts", str(family.prompts), *TOKENS))
    assert [row.pop("id") for row in found] == ["text", "one", "three"]
    assert found == family.answers
    different = [len(set(row["token_ids"])) for row in found]
    report_table([kind, layout, f"24 tokens of each of 3 answers equal, of them different: {different}"])
    assert min(different) > 2


@pytest.mark.parametrize("family", ["tiny-hybrid"], indirect=True)
def test_only_one_rank_prints(family):
    """One rank prints, whichever rank holds the logits."""
    images = [word for path in family.pictures for word in ("--image", str(path))]
    prompt = "<image_placeholder>red <image_placeholder>or <image_placeholder>?"
    run = on_ranks("pp2", family.models["native"], "--prompt", prompt, *images, *TOKENS, "--json")
    assert answers_of(run) == [family.answers[2]]


@pytest.mark.parametrize("family", ["tiny-hybrid"], indirect=True)
def test_mistake_is_reported_once(family, tmp_path):
    """The image belongs to the first stage alone, and the last one must not wait for it."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(family.pictures[0].read_bytes()[:200])
    run = on_ranks("pp2", family.models["native"], "--prompt", "red", "--image", str(broken), *TOKENS)
    told = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode != 0 and run.stdout == ""
    assert len(told) == 1 and str(broken) in told[0]
    # torchrun's own report of the failure is a traceback; none may stand before it.
    assert f'File "{ROOT}/megavl/' not in run.stderr


@pytest.mark.parametrize("family", ["tiny-hybrid"], indirect=True)
@pytest.mark.parametrize("layout", ["tp2 pp2"])
def test_evaluation_equals_one_process(family, layout, tmp_path, report_table):
    """Choices of one and of several tokens, a free-form answer and a text; rows are scored through both stages."""
    question = {"prompt": "which?", "images": [str(family.pictures[0])]}
    lines = [
        question | {"id": "short", "choices": ["red", "green"], "answer": 0},
        question | {"id": "long", "choices": ["a red house", "a red mouse", "blue"], "answer": 2},
        question | {"id": "open", "answers": ["red"]},
        {"id": "page", "text": "The quick brown fox jumps over the lazy dog."},
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmarks = [f"{name}={published.WRITERS[name](tmp_path)}" for name in ("mmbench", "pope")]
    words = (str(task), "--max-new-tokens", "8", "--benchmark", *benchmarks)
    assert (
        main(["evaluate", str(family.models["native"]), *words, "--device", "cpu", "--json", str(tmp_path / "1")]) == 0
    )
    run = on_ranks(
        layout,
        family.models["native"],
        *words,
        "--json",
        str(tmp_path / "2"),
        "--out",
        str(tmp_path / "out"),
        what="evaluate",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2 + 1 + 4 + 6
    alone, ranks = (json.loads((tmp_path / name).read_text()) for name in "12")
    assert (
        ranks["benchmarks"] == alone["benchmarks"]
        and ranks["written"] == alone["written"]
        and ranks["accuracy"] == alone["accuracy"]
    )
    pairs = [
        (a, b)
        for one, other in zip(ranks["questions"], alone["questions"], strict=True)
        for a, b in zip(one["perplexities"], other["perplexities"], strict=True)
    ]
    pairs.append((ranks["text"]["bits_per_byte"], alone["text"]["bits_per_byte"]))
    worst = max(abs(a / b - 1) for a, b in pairs)
    report_table([layout, "perplexities and bits per byte against one process, relative", worst])
    assert worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny-hybrid"], indirect=True)
def test_lost_peer_ends_the_other(family, tmp_path):
    """Without torchrun, which would end it itself."""
    prompts = tmp_path / "many.jsonl"
    prompts.write_text('{"prompt": "red?"}\n' * 1000)
    command = [sys.executable, "-W", "ignore", "-m", "megavl", "generate", str(family.models["native"])]
    command += ["--device", "cpu", "--pipeline", "2", "--prompts", str(prompts), "--batch-size", "1", *TOKENS]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert json.loads(ranks[0].stdout.readline())["prompt_tokens"] > 0
        ranks[0].kill()
        _, told = ranks[1].communicate(timeout=1800)
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == 7
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "lost a peer" in line and "Traceback" not in told
