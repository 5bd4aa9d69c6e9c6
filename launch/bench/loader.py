"""Images per second of the training loader, against bare decoding and resizing on the same machine.

Makes JPEG files of two sizes, preprocesses them for both released image geometries, lets
`launch/bench/engines/measure_loader.py` measure each dataset, and writes
`launch/bench/results/loader_<processor>_<YYYYMM>.md`.

    python launch/bench/loader.py [--images 100] [--rounds 7] [--workers 1]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((1024, 768), (640, 480))
PRESETS = ("siglip-384", "hybrid-1024")
QUALITY = 88
GOAL = 0.8


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="files of each size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            captions, kilobytes = make_images(Path(folder) / str(width), (width, height), count=arguments.images)
            run(
                "data_tools/build_corpus.py",
                "tokenizer",
                "--output",
                captions.parent / "tokenizer",
                "--input",
                captions,
            )
            for preset in PRESETS:
                result = measure(captions, preset=preset, rounds=arguments.rounds, workers=arguments.workers)
                rows.append(row((width, height), kilobytes, preset, result))
                print(rows[-1], flush=True)
    path = report_path()
    path.parent.mkdir(exist_ok=True)
    path.write_text(report(rows, arguments, load=load), encoding="utf-8")
    print(path)
    return 0


def make_images(folder: Path, size: tuple[int, int], *, count: int) -> tuple[Path, int]:
    """Photograph-like JPEG files with captions; returns the captions and the files' mean size in KB."""
    (folder / "images").mkdir(parents=True)
    records, total = [], 0
    for number in range(count):
        draw = np.random.default_rng(number)
        coarse = draw.integers(0, 255, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + draw.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=QUALITY)
        (folder / f"images/{number}.jpg").write_bytes(out.getvalue())
        total += len(out.getvalue())
        text = f"Picture {number} of {count}. " + "It shows soft colours and some grain. " * (1 + number % 9)
        records.append(json.dumps({"image": f"images/{number}.jpg", "text": text}) + "\n")
    captions = folder / "captions.jsonl"
    captions.write_text("".join(records), encoding="utf-8")
    return captions, round(total / count / 1000)


def measure(captions: Path, *, preset: str, rounds: int, workers: int) -> dict[str, Any]:
    """What launch/bench/engines/measure_loader.py found on the captions, packed for a geometry."""
    output = captions.parent / preset
    run(
        *(
            "data_tools/preprocess.py",
            "--input",
            captions,
            "--output",
            output,
            "--tokenizer",
            captions.parent / "tokenizer",
        ),
        *("--image-preset", preset, "--workers", 1),
    )
    result: dict[str, Any] = json.loads(
        run("launch/bench/engines/measure_loader.py", output, "--rounds", rounds, "--workers", workers, "--json")
    )
    return result


def run(script: str, *arguments: Any) -> str:
    """Standard output of a program."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    ).stdout


def row(size: tuple[int, int], kilobytes: int, preset: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"| {size[0]}x{size[1]}, {kilobytes} KB | {preset} | {result['bare_per_s']:.0f} | "
        f"{result['loader_per_s'] / result['workers']:.0f} | {result['ratio']:.2f} | {result['bare_cpu_ms']:.2f} | "
        f"{result['worker_cpu_ms']:.2f} | {result['cpu_ratio']:.2f} | {result['rank_cpu_ms']:.2f} |"
    )


def report_path() -> Path:
    """Named by theme, hardware and month."""
    hardware = f"{platform.machine()}-{os.cpu_count()}cores"
    return ROOT / "launch/bench/results" / f"loader_{hardware}_{time.strftime('%Y%m')}.md"


def report(rows: list[str], arguments: argparse.Namespace, *, load: float) -> str:
    """Markdown with the command and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("pillow", "numpy", "torch"))
    head = [
        "# Loader: images per second against bare decoding and resizing",
        "",
        f"`python launch/bench/loader.py --images {arguments.images} --rounds {arguments.rounds} "
        f"--workers {arguments.workers}`; Python {platform.python_version()}, {versions}; {os.cpu_count()} cores "
        f"({platform.machine()}), load average {load:.1f} at the start.",
        f"Synthetic photographs, JPEG quality {QUALITY}. Bare: Pillow's decoding and bicubic resizing in one process. "
        "Loader: from stored bytes to batches, crc32, padding and packing included. Rates are medians over alternating "
        f"rounds, CPU times the best round. Goal: {GOAL} per worker.",
        "",
        "| file | geometry | bare images/s | loader images/s per worker | ratio | CPU ms bare | CPU ms in a worker "
        "| ratio | CPU ms in the training process |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
