"""A hundred training runs killed at random moments, each compared bitwise with an undisturbed run.

Makes a small dataset, runs `engines/kill_campaign.py`, and writes
`launch/bench/results/kills_<processor>_<YYYYMM>.md`. The same command goes on where an earlier one ended.

    python -m launch.bench.kills --work DIR [--kills 100] [--seed 1] [--async-saves] [--compile layers]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from launch.bench.programs import environment, output, python
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

ENGINE = "launch.bench.engines.kill_campaign"


def main() -> int:
    """Run the campaign and write the report; 1 if some run ended otherwise than the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the moments and victims")
    parser.add_argument("--async-saves", action="store_true", help="save in the background; a report of its own")
    parser.add_argument("--compile", choices=("kernels", "layers"), help="training.compile; a report of its own")
    arguments = parser.parse_args()
    asynchronous, compiled = arguments.async_saves, arguments.compile
    extra = ["checkpoint.async_save=true"] * asynchronous
    if compiled:
        # The first step of the first run waits for the compiler, which may take minutes.
        extra += [f"training.compile={compiled}", "parallel.timeout_s=300"]
    theme = "_".join(["kills", *["async"] * asynchronous, *([compiled] if compiled else [])])
    # Rows of other options or moments are not these.
    data, work = arguments.work / "data", arguments.work / f"{theme}_{arguments.seed}"
    results = work / "kills.jsonl"
    if not (data / "shards/manifest.json").exists():
        make_data(data)
    words = ["--data", data, "--work", work / "runs", "--out", results]
    words += ["--kills", arguments.kills, "--seed", arguments.seed, *(["--set", *extra] if extra else [])]
    # A compiler that fails says so in a warning, which the campaign looks for.
    quiet = [] if compiled else ["-W", "ignore"]
    command = [python(), *quiet, "-m", ENGINE, *map(str, words)]
    code = subprocess.run(command, env=environment(gpu=True), check=False).returncode
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if len(rows) < arguments.kills:
        return code or 1
    options = ["--async-saves"] * asynchronous + (["--compile", compiled] if compiled else [])
    write_report(report_path(theme), report(rows, seed=arguments.seed, options=options, extra=extra))
    return code


def make_data(folder: Path) -> None:
    """A corpus with tokenizer, and its shards."""
    corpus = folder / "corpus"
    output("data_tools.build_corpus", "demo", "--output", corpus, "--samples", 96, "--size", 200_000)
    output(
        *("data_tools.preprocess", "--input", corpus / "text.jsonl", corpus / "captions.jsonl"),
        *("--output", folder / "shards", "--tokenizer", corpus / "tokenizer", "--image-preset", "tiny-hybrid"),
        *("--seq-length", 256, "--max-images-per-sequence", 4, "--workers", 1),
    )


def report(rows: list[dict[str, Any]], *, seed: int, options: list[str], extra: list[str]) -> list[str]:
    """The lines of the report."""
    equal = sum(row["equal_losses"] and row["equal_bytes"] for row in rows)
    lines = [
        "# Runs killed with SIGKILL at random moments",
        "",
        f"{equal} of {len(rows)} runs end bitwise as an undisturbed run: every loss and norm of `metrics.jsonl`, and "
        "every byte of the last checkpoint. Each run was killed once and started again with the same command.",
        "",
        f"    {' '.join(['python -m launch.bench.kills --work DIR --kills', f'{len(rows)} --seed {seed}', *options])}",
        "",
        f"{machine()}, {versions('torch', 'megatron-core')}. `launch/recipes/tiny/stage2.yaml` on two ranks over "
        f"gloo, 6 steps of 2 sequences, a checkpoint every second step{''.join(f', `{one}`' for one in extra)}. "
        "Moments are drawn evenly from the whole run, start and end included.",
    ]
    victims = sorted({row["victim"] for row in rows})
    counts = Counter((row["layout"], row["victim"], row["equal_losses"] and row["equal_bytes"]) for row in rows)
    lines += table(
        f"| layout | {' | '.join(f'{victim} killed' for victim in victims)} |",
        [
            table_row(
                layout,
                *(
                    f"{counts[layout, v, True]} of {counts[layout, v, True] + counts[layout, v, False]}"
                    for v in victims
                ),
            )
            for layout in sorted({row["layout"] for row in rows})
        ],
    )
    moments = {
        "before the first step was logged": [row for row in rows if not row["logged"]],
        "during a save": [row for row in rows if row["saving"]],
        "at another moment": [row for row in rows if row["logged"] and not row["saving"]],
    }
    lines += table("| moment of the kill | runs |", [table_row(name, len(found)) for name, found in moments.items()])
    orphans = [row for row in rows if row["victim"] == "launcher"]
    refused = sum(row["refused"] > 0 for row in orphans)
    ended: Counter[int] = Counter(
        code for row in rows if row["victim"].startswith("rank") for code in row["codes"].values() if code != -9
    )
    codes = " and ".join(f"{code} ({count} times)" for code, count in sorted(ended.items()))
    lines += [
        "",
        f"Ranks that lost their peer ended with code {codes}. Where torchrun alone was killed, its ranks were left to "
        f"themselves: {refused} of {len(orphans)} such runs were refused with code 2 until the old ranks had gone. "
        "None stayed.",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
