"""What options cost: questions with one image and four options, against the same questions with one option.

Everything runs in one process on one thread, round by round, and is measured in processor time, since other programs
may share the machine. Prompts are encoded and images are read anew in every round, as `megavl evaluate` does. Writes
`launch/bench/results/evaluate_<processor>_<YYYYMM>.md`.

    python -m launch.bench.evaluate [--questions 280] [--rounds 5] [--demo runs/demo/summary.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from launch.bench.engines.decode_speed import write_folder
from launch.bench.report import machine, report_path, table, table_row, versions, write_report
from megavl.config.load import load_model_config
from megavl.evaluate.multiple_choice import encode_questions
from megavl.evaluate.task import Question
from megavl.generate.pretrained import Model

OPTIONS, OPTION_TOKENS, PROMPT_LETTERS = 4, 20, 30
PICTURE = (320, 240)
WAYS = {
    "one option": lambda questions: [replace(one, choices=one.choices[:1]) for one in questions],
    "four options": lambda questions: questions,
    "four options, each with its own prompt": lambda questions: [
        replace(one, choices=(choice,)) for one in questions for choice in one.choices
    ],
}
"""How the questions are asked."""


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=280)
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--demo", type=Path, help="summary.json of `make demo`: adds what its evaluations took")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(load_model_config("tiny-hybrid"), Path(scratch) / "hf")
        model = Model.load(Path(scratch) / "hf", dtype="float32")
        questions = make_questions(arguments.questions, folder=Path(scratch))
        asked = {way: ask(questions) for way, ask in WAYS.items()}
        tokens = {way: count_tokens(model, some) for way, some in asked.items()}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds + 1):
            for way in WAYS if number % 2 else reversed(WAYS):
                took = measure(lambda way=way: score(model, asked[way]))
                if number:
                    seconds[way].append(took)
            print({way: round(values[-1], 2) for way, values in seconds.items() if values}, flush=True)
    lines = report(seconds, tokens, questions=arguments.questions)
    write_report(report_path("evaluate"), lines + (during_training(arguments.demo) if arguments.demo else []))
    return 0


def make_questions(count: int, *, folder: Path) -> list[Question]:
    """Questions of random letters, each with a picture of its own. The tokenizer gives every letter a token."""
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), length))

    questions = []
    for number in range(count):
        path = folder / f"{number}.png"
        pixels = rng.integers(0, 256, (PICTURE[1] // 8, PICTURE[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(PICTURE).save(path)
        choices = tuple(text(OPTION_TOKENS - 1) for _ in range(OPTIONS))
        questions.append(
            Question(id=str(number), images=(path,), prompt=text(PROMPT_LETTERS), choices=choices, answer=0)
        )
    return questions


def score(model: Model, questions: Sequence[Question]) -> None:
    """Encode and score all questions."""
    model.score_requests(encode_questions(questions, processor=model.processor, system=""))


def count_tokens(model: Model, questions: Sequence[Question]) -> int:
    """Tokens that the decoder reads: each prompt once, and all but the last token of each option."""
    found = 0
    for request in encode_questions(questions, processor=model.processor, system=""):
        found += request.options[0].start + sum(len(one.ids) - 1 - one.start for one in request.options)
    return found


def measure(action: Callable[[], None]) -> float:
    """Seconds of processor time."""
    began = time.process_time()
    action()
    return time.process_time() - began


def report(seconds: dict[str, list[float]], tokens: dict[str, int], *, questions: int) -> list[str]:
    """Markdown with the command and the figures."""
    base = "one option"
    rows = []
    for way, values in seconds.items():
        ratios = [took / first for took, first in zip(values, seconds[base], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(table_row(way, f"{statistics.median(values):.2f}", spread, f"{tokens[way] / tokens[base]:.2f}"))
    return [
        "# Scoring options after a shared prompt",
        "",
        f"`python -m launch.bench.evaluate --questions {questions}`; {versions('torch', 'megatron-core')}; "
        f"{machine()}, one thread.",
        f"Random weights of the demo's model, {questions} questions, one image of {PICTURE[0]} x {PICTURE[1]} pixels "
        f"each. A prompt has {PROMPT_LETTERS} random letters and an option {OPTION_TOKENS} tokens. Seconds of "
        "processor time with encoding and reading of images, without start-up: medians over the rounds. Ratios are "
        "to one option in the same round, with their extremes.",
        *table("| questions with | s | to one option | tokens to one option |", rows),
    ]


def during_training(summary: Path) -> list[str]:
    """Markdown with what each evaluation within the demo's training took."""
    found = json.loads(summary.read_text(encoding="utf-8"))
    times = [row["time_in_steps"] for row in found["evaluation"]]
    layout = " x ".join(f"{axis.upper()} {size}" for axis, size in found["layout"].items())
    return [
        "",
        "## Within training",
        "",
        f"`make demo` on the same machine, {layout}: an evaluation of its {found['accuracy']['n']} questions "
        f"took the time of {statistics.median(times):.1f} training steps, {min(times):.1f} to {max(times):.1f} in "
        f"{len(times)} evaluations.",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
