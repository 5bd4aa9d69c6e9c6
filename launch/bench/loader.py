"""Images per second of the training loader, against bare decoding and resizing on the same machine.

Makes JPEG files of two sizes, preprocesses them for both released image geometries, measures each dataset with
`engines/measure_loader.py`, and writes `launch/bench/results/loader_<processor>_<YYYYMM>.md`.

    python -m launch.bench.loader [--images 100] [--rounds 7] [--workers 1]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.bench.engines.photos import QUALITY, photo
from launch.bench.programs import ask, output
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

SIZES = ((1024, 768), (640, 480))
PRESETS = ("siglip-384", "hybrid-1024")
GOAL = 0.8


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="files of each size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            captions, kilobytes = make_images(Path(folder) / str(size[0]), size, count=arguments.images)
            tokenizer = captions.parent / "tokenizer"
            output("data_tools.build_corpus", "tokenizer", "--output", tokenizer, "--input", captions)
            for preset in PRESETS:
                result = measure(captions, preset=preset, rounds=arguments.rounds, workers=arguments.workers)
                rows.append(line(f"{size[0]}x{size[1]}, {kilobytes} KB", preset, result))
                print(rows[-1], flush=True)
    write_report(report_path("loader"), report(rows, arguments, load=load))
    return 0


def make_images(folder: Path, size: tuple[int, int], *, count: int) -> tuple[Path, int]:
    """Photograph-like JPEG files with captions; returns the captions and the files' mean size in KB."""
    (folder / "images").mkdir(parents=True)
    records, total = [], 0
    for number in range(count):
        data = photo(number, size)
        (folder / f"images/{number}.jpg").write_bytes(data)
        total += len(data)
        text = f"Picture {number} of {count}. " + "It shows soft colours and some grain. " * (1 + number % 9)
        records.append(json.dumps({"image": f"images/{number}.jpg", "text": text}) + "\n")
    captions = folder / "captions.jsonl"
    captions.write_text("".join(records), encoding="utf-8")
    return captions, round(total / count / 1000)


def measure(captions: Path, *, preset: str, rounds: int, workers: int) -> dict[str, Any]:
    """What `engines/measure_loader.py` finds on the captions, packed for a geometry."""
    folder = captions.parent
    output(
        *("data_tools.preprocess", "--input", captions, "--output", folder / preset, "--workers", 1),
        *("--tokenizer", folder / "tokenizer", "--image-preset", preset),
    )
    counts = ("--rounds", rounds, "--workers", workers)
    (result,) = ask("launch.bench.engines.measure_loader", folder / preset, *counts)
    return result


def line(file: str, preset: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    return table_row(
        *(file, preset, f"{result['bare_per_s']:.0f}", f"{result['loader_per_s'] / result['workers']:.0f}"),
        *(f"{result[name]:.2f}" for name in ("ratio", "bare_cpu_ms", "worker_cpu_ms", "cpu_ratio", "rank_cpu_ms")),
    )


def report(rows: list[str], arguments: argparse.Namespace, *, load: float) -> list[str]:
    """Markdown with the command and versions."""
    return [
        "# Loader: images per second against bare decoding and resizing",
        "",
        f"`python -m launch.bench.loader --images {arguments.images} --rounds {arguments.rounds} --workers "
        f"{arguments.workers}`; {versions('pillow', 'numpy', 'torch')}; {machine()}, load average {load:.1f} at the "
        "start.",
        f"Synthetic photographs, JPEG quality {QUALITY}. Bare: Pillow's decoding and bicubic resizing in one process. "
        "Loader: from stored bytes to batches, with crc32, padding and packing. Rates are medians over alternating "
        f"rounds, CPU times the best round. Goal: {GOAL} per worker.",
        *table(
            "| file | geometry | bare images/s | loader images/s per worker | ratio | CPU ms bare | CPU ms in a worker "
            "| ratio | CPU ms in the training process |",
            rows,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
