"""lm-evaluation-harness on one model: MegaVL's adapter in process, and the harness's own client on the same decoder.

Both get the same requests in one process on one thread, with the same batch size, and are measured in processor time,
since other programs may share the machine. The answers are compared too. Writes
`launch/bench/results/harness_<processor>_<YYYYMM>.md`. Needs the extra `lm-eval`, and accelerate for the client.

    python -m launch.bench.harness [--documents 60] [--rounds 3] [--batch-size 8]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.bench.engines.random_models import random_weights, write_tokenizer
from launch.bench.report import machine, report_path, table, table_row, versions, write_report
from megavl.config.load import load_model_config
from megavl.convert.hf_write import write_hf
from megavl.generate.pretrained import Model
from megavl.weights.lazy import LazyTensor

KINDS = ("endings", "letters", "texts", "answers")
WHAT = {
    "endings": "four endings of 20 letters after 60 (HellaSwag)",
    "letters": "one of four letters after 400 (MMLU with examples)",
    "texts": "texts of 600 letters (bits per byte)",
    "answers": "answers of 32 tokens after 100 letters",
}
"""What is asked of both."""


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    requests = {kind: make_requests(kind, arguments.documents) for kind in KINDS}
    seconds: dict[tuple[str, str], list[float]] = {}
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_folders(Path(scratch))
        for number in range(arguments.rounds + 1):
            for kind in KINDS:
                found: dict[str, Any] = {}
                for name, client in clients(Path(scratch), kind, batch_size=arguments.batch_size).items():
                    took, found[name] = measure(lambda client=client, kind=kind: ask(client, kind, requests[kind]))
                    if number:
                        seconds.setdefault((kind, name), []).append(took)
                worst[kind] = difference(*found.values())
            print({key: round(values[-1], 2) for key, values in seconds.items()}, worst, flush=True)
    lines = report(seconds, worst, arguments=arguments)
    write_report(report_path("harness"), lines)
    return 0


def write_folders(folder: Path) -> None:
    """The demo's model with random weights, whole and as the decoder alone."""
    config = load_model_config("tiny-hybrid")
    tensors = {name: LazyTensor.of(tensor) for name, tensor in random_weights(config, seed=2)}
    tokenizer = write_tokenizer(folder / "tokenizer")
    for fmt in ("native", "llm"):
        write_hf(folder / fmt, config=config, tensors=tensors, fmt=fmt, tokenizer_dir=tokenizer, dtype="float32")


def clients(folder: Path, kind: str, *, batch_size: int) -> dict[str, Any]:
    """The adapter without anything that it knows already, and the harness's own client; each loaded once."""
    from lm_eval.models.huggingface import HFLM

    from megavl.evaluate.harness.language_model import HarnessModel

    if not _LOADED:
        _LOADED["model"] = Model.load(folder / "native", dtype="float32")
    # The client would count p(BOS | BOS) of every rolling text.
    bos = None if kind != "texts" else False
    name = f"client {bos}"
    if name not in _LOADED:
        _LOADED[name] = HFLM(
            str(folder / "llm"), batch_size=batch_size, device="cpu", dtype="float32", add_bos_token=bos
        )
    return {"adapter": HarnessModel(lambda: _LOADED["model"], batch_size=batch_size), "client": _LOADED[name]}


_LOADED: dict[str, Any] = {}


def make_requests(kind: str, documents: int) -> list[Any]:
    """Requests of random letters, of which the tokenizer makes a token each."""
    from lm_eval.api.instance import Instance

    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), length)).strip() or "a"

    def arguments() -> list[tuple[Any, ...]]:
        if kind == "endings":
            context = text(60)
            return [(context, f" {text(20)}") for _ in range(4)]
        if kind == "letters":
            context = text(400)
            return [(context, f" {letter}") for letter in "ABCD"]
        if kind == "texts":
            return [(text(600),)]
        return [(text(100), {"until": ["\n\n"], "max_gen_toks": 32})]

    request = {"texts": "loglikelihood_rolling", "answers": "generate_until"}.get(kind, "loglikelihood")
    every = [one for _ in range(documents) for one in arguments()]
    return [
        Instance(request_type=request, doc={}, arguments=one, idx=number, metadata=("bench", number, 1))
        for number, one in enumerate(every)
    ]


def ask(client: Any, kind: str, requests: Sequence[Any]) -> list[Any]:
    """What a client makes of the requests."""
    method = {"texts": "loglikelihood_rolling", "answers": "generate_until"}.get(kind, "loglikelihood")
    return list(getattr(client, method)(list(requests), disable_tqdm=True))


def measure(action: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    """Seconds of processor time, and what came of it."""
    began = time.process_time()
    found = action()
    return time.process_time() - began, found


def difference(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Largest relative difference of a number; texts and marks must be equal.

    Raises:
        AssertionError: they are not.
    """
    largest = 0.0
    for found, expected in zip(one, other, strict=True):
        if isinstance(expected, str):
            assert found == expected, f"{found!r} and {expected!r}"
            continue
        if isinstance(expected, tuple):
            assert found[1] == expected[1], f"{found} and {expected}"
            found, expected = found[0], expected[0]
        largest = max(largest, abs(found - expected) / abs(expected))
    return largest


def report(
    seconds: dict[tuple[str, str], list[float]], worst: dict[str, float], *, arguments: argparse.Namespace
) -> list[str]:
    """Markdown with the command and the figures."""
    rows = []
    for kind in KINDS:
        ours, theirs = seconds[kind, "adapter"], seconds[kind, "client"]
        ratios = [other / one for one, other in zip(ours, theirs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        gap = "texts equal" if kind == "answers" else f"{worst[kind]:.1e}"
        rows.append(
            table_row(WHAT[kind], f"{statistics.median(ours):.2f}", f"{statistics.median(theirs):.2f}", spread, gap)
        )
    return [
        "# lm-evaluation-harness in process and through its own client",
        "",
        f"`python -m launch.bench.harness --documents {arguments.documents} --rounds {arguments.rounds} --batch-size "
        f"{arguments.batch_size}`; {versions('torch', 'transformers', 'lm_eval', 'megatron-core')}; {machine()}, one "
        "thread.",
        f"Random weights of the demo's model in fp32, {arguments.documents} documents of each kind. The adapter runs "
        "the whole model, the client (`hf`) the decoder that `megavl convert to-hf --format llm` wrote. Seconds of "
        "processor time without start-up: medians over the rounds, with the extremes of the ratio.",
        *table("| asked | adapter, s | client, s | client to adapter | difference |", rows),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
