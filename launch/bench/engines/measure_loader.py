"""Compares images per second of the training loader with one core that only decodes and resizes the same files.

Rounds of both alternate, so that other work on the machine slows both alike.

Prints one JSON object; `launch/bench/loader.py` writes the report.

    python -m launch.bench.engines.measure_loader DATASET [--workers N]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import psutil
from PIL import Image

from megavl.config.data import ModalityWeights
from megavl.config.errors import DataError, MegaVLError
from megavl.config.presets import ImageGeometry
from megavl.data.dataset import Dataset, Source
from megavl.data.loader import StepLoader
from megavl.data.manifest import GeometryEntry
from megavl.data.mixture import Mixture
from megavl.data.plan import ModalityPlan
from megavl.data.sampler import Sampler
from megavl.data.table import ReadHandles

_BATCH = 4
"""Sequences per step."""
_PREFETCH = 64
_TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Resolution of the CPU times of other processes, seconds."""


def measure(path: str, *, workers: int, rounds: int, steps: int) -> dict[str, float]:
    """Alternate rounds of both.

    Args:
        workers: decoding processes, at least 1.
        steps: loader steps per round.

    Returns:
        Images per second of bare decoding on one core and of all workers together (`bare_per_s`, `loader_per_s`), and
        CPU milliseconds per image of bare decoding, of a worker and of this process. `ratio` is the rate per worker
        against the bare rate, `cpu_ratio` the same in CPU time. Rates are medians over rounds, CPU times the best
        round, which other work on the machine disturbs less.

    Raises:
        DataError: the dataset is damaged, or holds no images.
    """
    dataset = _open(path)
    total = rounds * (steps + 2)
    weights = {"text": 0.0, "multimodal": 1.0}
    mixture = Mixture([weights], plan=ModalityPlan(seed=0, fraction=1.0), global_batch_size=_BATCH)  # type: ignore[list-item]
    sampler = Sampler(dataset.counts, mixture=mixture)
    loader = StepLoader(
        dataset,
        sampler=sampler,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        num_workers=workers,
        prefetch_images=_PREFETCH,
        max_bad_in_row=1,
        cross_document_attention=False,
        total_steps=total,
    )
    pairs = []
    try:
        for number in range(rounds):
            first = number * (steps + 2)
            pairs.append((*_bare(dataset, sampler, step=first), *_loaded(loader, first=first, steps=steps)))
    finally:
        loader.close()
    middle = [statistics.median(column) for column in zip(*pairs)]
    bare_ms, worker_ms, rank_ms = (min(pair[at] for pair in pairs) for at in (1, 3, 4))
    return {
        "workers": workers,
        "images": int(middle[5]),
        "bare_per_s": middle[0],
        "loader_per_s": middle[2],
        "ratio": statistics.median(pair[2] / workers / pair[0] for pair in pairs),
        "cpu_ratio": bare_ms / worker_ms,
        "bare_cpu_ms": bare_ms,
        "worker_cpu_ms": worker_ms,
        "rank_cpu_ms": rank_ms,
    }


def _open(path: str) -> Dataset:
    handles = ReadHandles()
    source = Source(path, handles=handles)
    if not source.counts["multimodal"]:
        raise DataError(f"{path}: holds no sequences with images; name a dataset that does")
    manifest = source.manifest
    return Dataset(
        [source],
        weights=[ModalityWeights(multimodal=1.0)],
        pad_id=manifest.tokenizer.pad_id,
        geometry=_geometry(manifest.geometry),
        handles=handles,
    )


def _geometry(entry: GeometryEntry) -> ImageGeometry:
    known = {name: value for name, value in asdict(entry).items() if name not in ("tokens", "resize")}
    return ImageGeometry(**known)


def _bare(dataset: Dataset, sampler: Sampler, *, step: int) -> tuple[float, float]:
    """Images per second, and CPU milliseconds per image, of Pillow's decoding and bicubic resizing in this process."""
    size = dataset.geometry.canvas_size
    files = [
        image
        for ref in sampler.global_batch(step) + sampler.global_batch(step + 1)
        for member in dataset.read(source=0, modality="multimodal", index=ref.index).members
        for image in member.images
    ]
    handles = ReadHandles()
    began, before = time.perf_counter(), time.process_time()
    for file in files:
        image = Image.open(io.BytesIO(handles.read(file.path, offset=file.offset, size=file.size))).convert("RGB")
        width, height = (max(int(side / max(image.size) * size), dataset.geometry.min_size) for side in image.size)
        image.resize((width, height), Image.Resampling.BICUBIC)
    seconds, spent = time.perf_counter() - began, time.process_time() - before
    return len(files) / seconds, 1000 * spent / len(files)


def _loaded(loader: StepLoader, *, first: int, steps: int) -> tuple[float, float, float, int]:
    """Images per second, CPU milliseconds per image of the workers and of this process, and images."""
    # In two steps the workers start, and prefetched images are used up.
    for step in range(first, first + 2):
        loader.get(step)
    images, began, before = 0, time.perf_counter(), _cpu()
    for step in range(first + 2, first + 2 + steps):
        images += sum(len(batch.images) for batch in loader.get(step))
    seconds, after = time.perf_counter() - began, _cpu()
    # The system counts a child's time in ticks; a short round may take less than one.
    workers, own = (max(b - a, _TICK) for a, b in zip(before, after, strict=True))
    return images / seconds, 1000 * workers / images, 1000 * own / images, images


def _cpu() -> tuple[float, float]:
    """CPU seconds so far of the children and of this process."""
    spent = [sum(child.cpu_times()[:2]) for child in psutil.Process().children()]
    return sum(spent), time.process_time()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder written by preprocess.py, with images")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="loader steps per round (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.workers, options.rounds, options.steps) < 1:
        parser.error("--workers, --rounds and --steps: give 1 or more")
    try:
        rate = measure(options.dataset, workers=options.workers, rounds=options.rounds, steps=options.steps)
    except MegaVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
