"""Tokens per second of `megavl serve` with eight clients at once against one client alone.

One server answers both in turn, round after round, so that both meet the same state of the machine. Clients stream
chat answers over HTTP. Writes `launch/bench/results/serve_<processor>_<YYYYMM>.md`.

    python -m launch.bench.serve [--case "wide float32 text" ...] [--rounds 5] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from launch.bench.programs import ROOT, environment
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

CLIENTS = 8
TOKENS = {"tiny": 128, "medium": 128, "wide": 24}
"""Tokens of an answer by model."""
CASES = ("tiny float32 text", "tiny float32 image", "medium float32 text", "wide float32 text")
"""Model, type of the weights, and whether each prompt has an image."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second."""

    wall: float
    cpu: float
    """Per second of the server's processor time."""


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one that warms up (default: %(default)s)")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs"), help="where the folders are written; default: runs"
    )
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else ran on the machine")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    rows = {}
    for case in arguments.case or CASES:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            rows[case] = measure(case, Path(scratch) / "hf", rounds=arguments.rounds)
    write_report(report_path("serve"), report(rows, note=arguments.note))
    return 0


def measure(case: str, folder: Path, *, rounds: int) -> dict[int, list[Rate]]:
    """The rate in every round that counts, by number of clients."""
    model, dtype, kind = case.split()
    variables = environment()
    words = ("-W", "ignore", "-m", "launch.bench.engines.decode_speed", "folder", str(folder), "--model", model)
    subprocess.run([sys.executable, *words], check=True, env=variables)
    command = (sys.executable, "-W", "ignore", "-m", "megavl", "serve", str(folder), "--dtype", dtype)
    options = ("--device", "cpu", "--port", "0", "--batch-size", str(CLIENTS), "--max-tokens", "1024")
    server = subprocess.Popen([*command, *options], env=variables, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None, "it is a pipe"
        address = server.stdout.readline().partition("http://")[2].split(" ")[0]
        if not address:
            raise SystemExit(f"error: {' '.join(command)} ended early; run it by hand to see why")
        process = psutil.Process(server.pid)
        found: dict[int, list[Rate]] = {1: [], CLIENTS: []}
        for number in range(rounds + 1):
            for clients in found:
                before = sum(process.cpu_times()[:2])
                tokens, seconds = answers(address, clients, tokens=TOKENS[model], image=kind == "image")
                if number:
                    busy = sum(process.cpu_times()[:2]) - before
                    found[clients].append(Rate(wall=tokens / seconds, cpu=tokens / busy))
            if number:
                rates = (f"{clients} clients {found[clients][-1].wall:.1f} tokens/s" for clients in found)
                print(f"{case}: round {number}, {', '.join(rates)}", flush=True)
        return found
    finally:
        server.terminate()
        server.wait()


def answers(address: str, clients: int, *, tokens: int, image: bool) -> tuple[int, float]:
    """Tokens of all answers, and the time from the first request to the last token in seconds."""
    bodies = [_body(number, tokens=tokens, image=image) for number in range(clients)]
    with ThreadPoolExecutor(clients) as threads:
        began = time.perf_counter()
        counts = list(threads.map(lambda body: ask(address, body), bodies))
        return sum(counts), time.perf_counter() - began


def ask(address: str, body: bytes) -> int:
    """Tokens of a streamed answer."""
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    events = [line for line in answer if line.startswith(b"data: {")]
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"error: the server answered {answer.status}")
    tokens: int = json.loads(events[-1][6:])["usage"]["completion_tokens"]
    return tokens


def _body(number: int, *, tokens: int, image: bool) -> bytes:
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"Number {number}: which colour is it, and why?"}]
    if image:
        file = io.BytesIO()
        Image.new("RGB", (160, 120), (20 * number, 90, 200)).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    request = {"messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "stream": True}
    return json.dumps({**request, "stream_options": {"include_usage": True}}).encode()


def report(rows: dict[str, dict[int, list[Rate]]], *, note: str) -> list[str]:
    """Markdown with the command, the models and the figures."""
    lines = []
    for case, found in rows.items():
        pairs = list(zip(found[1], found[CLIENTS], strict=True))
        rates = (f"{statistics.median(rate.wall for rate in found[clients]):.1f}" for clients in found)
        cells = [_spread([many.wall / one.wall for one, many in pairs])]
        cells.append(_spread([many.cpu / one.cpu for one, many in pairs]))
        lines.append(table_row(case, TOKENS[case.split()[0]], *rates, *cells, len(pairs)))
    return [
        "# The server with eight clients against one",
        "",
        f"`python -m launch.bench.serve`; {versions('torch', 'megatron-core', 'uvicorn', 'starlette')}; {machine()}, "
        "one thread for the model; the clients run on the same machine.",
        "Random weights, greedy chat answers, streamed over HTTP on this machine. One server answers one client and "
        f"then {CLIENTS} at once, in every round. Rates count the tokens of all answers over the whole time, prompts "
        "included. Rates are medians over the rounds, ratios the medians of each round's ratio, with their extremes. "
        "The second ratio counts the server's processor time in place of the clock's, which other programs disturb.",
        *([note] if note else []),
        "",
        "tiny: the tiny-hybrid preset. medium: a decoder of width 512 with 8 layers. wide: the 1.3B with 6 of its 24 "
        "layers and 32,768 vocabulary rows.",
        *table(
            f"| model, type, prompt | tokens | 1 client, tokens/s | {CLIENTS} clients | ratio | by processor time "
            "| rounds |",
            lines,
        ),
    ]


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
