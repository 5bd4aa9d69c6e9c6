"""Measures preprocessing against its primitives; `launch/bench/preprocess.py` writes the report.

    python -m launch.bench.engines.measure_preprocess {text,images,packing,workers,memory} --scratch DIR [--repeats N]

Prints one JSON object. Both sides of a comparison run in turn, and the best repeat of each counts, because other
programs may run on the machine. Where both use one core, CPU time without the start-up is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from PIL import Image

from data_tools.corpus.demo.vocabulary import save_tokenizer, train_tokenizer
from data_tools.preprocess import main as preprocess
from launch.bench.engines.photos import photo
from launch.bench.programs import ROOT, output
from megavl.data.packing import Kinds, Packing, Placed
from megavl.data.tokenizer import open_tokenizer

VOCABULARY = 32_000
DOCUMENTS = 600
COPIES = 20
"""How often the documents are repeated where whole commands are timed."""
IMAGES = 200
_MEAN = 3600
"""Characters of a document."""
BATCH = 256
BARE_BATCH = 1000
S, K, IMAGE_TOKENS = 4096, 5, 576


def text(scratch: Path, *, repeats: int) -> dict[str, Any]:
    """Tokenise, pack and write, against `encode_batch` alone."""
    texts = documents(scratch, copies=1)
    tokenizer = open_tokenizer(scratch / "tokenizer")

    def bare() -> int:
        return sum(len(i) for n in range(0, len(texts), BATCH) for i in tokenizer.encode_batch(texts[n : n + BATCH]))

    tokens = bare()
    run = _run(scratch, "text.jsonl")
    best = _best({"bare": bare, "preprocess": run}, scratch=scratch, repeats=repeats)
    return {
        "documents": len(texts),
        "tokens": tokens,
        "bare_tokens_per_s": tokens / best["bare"],
        "tokens_per_s": tokens / best["preprocess"],
        "ratio": best["bare"] / best["preprocess"],
    }


def images(scratch: Path, *, repeats: int) -> dict[str, Any]:
    """Images that pass through with scaled verification, against Pillow's draft decoding of the same files."""
    documents(scratch, copies=1)
    files = photos(scratch)

    def bare() -> None:
        for data in files:
            image = Image.open(io.BytesIO(data))
            image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()

    actions: dict[str, Callable[[], object]] = {"bare": bare}
    for level in ("scaled", "header"):
        actions[level] = _run(scratch, "captions.jsonl", "--verify", level)
    best = _best(actions, scratch=scratch, repeats=repeats)
    return {
        "images": IMAGES,
        "mean_bytes": sum(map(len, files)) // IMAGES,
        "bare_images_per_s": IMAGES / best["bare"],
        "images_per_s": IMAGES / best["scaled"],
        "header_images_per_s": IMAGES / best["header"],
        "ratio": best["bare"] / best["scaled"],
    }


def _pack(lengths: Sequence[int], images: Sequence[int]) -> tuple[Packing, Placed]:
    kinds = Kinds(seq_length=S, max_images=K)
    kinds.add(lengths, images=images)
    packs = Packing(kinds)
    return packs, packs.cursor().place(lengths, images=images)


def packing(scratch: Path, *, repeats: int) -> dict[str, Any]:
    """Rate and fill on simulated lengths: text lognormal(6.3, 1.1); captions of one image (85%) or two to five."""
    rows = []
    for captions, texts in ((0, 1_000_000), (100_000, 220_000), (1_000_000, 2_200_000), (100_000, 0)):
        lengths, counts = _lengths(captions, texts)
        call = partial(_pack, lengths, counts)
        seconds = _best({"pack": call}, scratch=scratch, repeats=min(repeats, 3))["pack"]
        packs, placed = call()
        mixed = placed.multimodal
        held = np.bincount(placed.packs[mixed], weights=np.array(counts)[mixed]) if mixed.any() else np.zeros(0)
        rows.append(
            {
                "captions": captions,
                "texts": texts,
                "samples_per_s": len(lengths) / seconds,
                "fill": sum(lengths) / (S * (packs.text + packs.multimodal)),
                "images_per_sequence": float(np.mean(held)) if len(held) else 0.0,
                "images_deviation": float(np.std(held)) if len(held) else 0.0,
            }
        )
    return {"cases": rows}


def workers(scratch: Path, *, repeats: int) -> dict[str, Any]:
    """Wall and CPU time of the whole command with two workers against one, and of bare tokenizing processes.

    Two workers are less than twice as fast where the cores share caches, or while other programs use the second core.
    CPU time tells what they cost. The bare processes share nothing, so they show the most that the machine allows.
    """
    documents(scratch, copies=COPIES)
    wall: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    bare: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for count in (1, 2):
            bare[count].append(bare_processes(scratch, count=count, total=DOCUMENTS * COPIES))
            _clear(scratch)
            start, before = time.perf_counter(), os.times()
            _command(scratch, "text.jsonl", workers=count)
            after = os.times()
            wall[count].append(time.perf_counter() - start)
            cpu[count].append(
                after.children_user + after.children_system - before.children_user - before.children_system
            )
    return {
        "seconds_1": min(wall[1]),
        "seconds_2": min(wall[2]),
        "ratio": min(wall[1]) / min(wall[2]),
        "bare_ratio": min(bare[1]) / min(bare[2]),
        "cpu_1": min(cpu[1]),
        "cpu_2": min(cpu[2]),
        "all": [wall[1], wall[2]],
        "all_cpu": [cpu[1], cpu[2]],
        "all_bare": [bare[1], bare[2]],
    }


def bare_processes(scratch: Path, *, count: int, total: int, held: bool = False) -> float:
    """Seconds in which `count` processes tokenize the `total` documents of the scratch folder, start-up included.

    Each has its own share of the documents. It reads and tokenizes BARE_BATCH of them at a time, and drops them and
    their ids before the next, as every program does that writes shards.

    Args:
        held: a process reads its whole share first and keeps the text; by this, reports before version 0.3 measured.
    """
    code = (
        "import json, sys; from itertools import islice; from megavl.data.tokenizer import open_tokenizer\n"
        "scratch, first, end, batch, held = sys.argv[1], *map(int, sys.argv[2:])\n"
        "tokenizer = open_tokenizer(scratch + '/tokenizer')\n"
        "lines = islice(open(scratch + '/text.jsonl', encoding='utf-8'), first, end)\n"
        "if held:\n"
        "    texts = [json.loads(line)['text'] for line in lines]\n"
        "    for start in range(0, len(texts), batch):\n"
        "        tokenizer.encode_batch(texts[start : start + batch])\n"
        "while texts := [] if held else [json.loads(line)['text'] for line in islice(lines, batch)]:\n"
        "    tokenizer.encode_batch(texts)\n"
    )
    borders = [total * part // count for part in range(count + 1)]
    size = BATCH if held else BARE_BATCH
    started = time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, (scratch, first, end, size, int(held)))], cwd=ROOT)
        for first, end in zip(borders, borders[1:])
    ]
    codes = [process.wait() for process in running]
    assert not any(codes), f"tokenizing ended with {codes}"
    return time.perf_counter() - started


def memory(scratch: Path, *, repeats: int) -> dict[str, Any]:
    """Peak resident memory of the command with one worker, on an input and on ten times as much."""
    found = {}
    for copies in (1, 10):
        documents(scratch, copies=copies)
        _clear(scratch)
        found[copies] = _command(scratch, "text.jsonl", workers=1)
    return {
        "mib_1": found[1],
        "mib_10": found[10],
        "ratio": found[10] / found[1],
        "input_bytes": (scratch / "text.jsonl").stat().st_size,
    }


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (text, images, packing, workers, memory)
}


def _best(actions: dict[str, Callable[[], object]], *, scratch: Path, repeats: int) -> dict[str, float]:
    """Least CPU seconds of each action, taken in turn."""
    best = dict.fromkeys(actions, float("inf"))
    for _ in range(repeats):
        for name, action in actions.items():
            _clear(scratch)
            start = time.process_time()
            action()
            best[name] = min(best[name], time.process_time() - start)
    return best


def _clear(scratch: Path) -> None:
    """Remove an earlier output: freeing its pages takes time, and is no part of preprocessing."""
    shutil.rmtree(scratch / "out", ignore_errors=True)


def _arguments(scratch: Path, name: str, *, workers: int) -> list[str]:
    return [
        *("--input", str(scratch / name), "--output", str(scratch / "out")),
        *("--tokenizer", str(scratch / "tokenizer"), "--workers", str(workers)),
    ]


def command_line(scratch: Path, name: str, *, workers: int) -> list[str]:
    """Command that preprocesses an input of the scratch folder, after its earlier output was removed."""
    _clear(scratch)
    return [sys.executable, "data_tools/preprocess.py", *_arguments(scratch, name, workers=workers)]


def _run(scratch: Path, name: str, *more: str) -> Callable[[], object]:
    """Preprocess in this process; only the first call imports modules and opens the tokenizer."""

    def action() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = preprocess([*_arguments(scratch, name, workers=1), *more])
        assert code == 0, f"preprocess.py ended with {code}"

    return action


def _command(scratch: Path, name: str, *, workers: int) -> float:
    """Run preprocessing in a process of its own; returns the peak resident memory of its first process in MiB."""
    # The process itself reads its peak: what the system tells a parent includes the parent's own memory.
    code = (
        "import re, sys; from data_tools.preprocess import main\n"
        "if __name__ == '__main__':\n"
        "    code = main(sys.argv[1:])\n"
        "    print(re.search('VmHWM:\\\\s*(\\\\d+)', open('/proc/self/status').read())[1])\n"
        "    sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *_arguments(scratch, name, workers=workers)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(done.stdout.split()[-1]) / 1024


def photos(scratch: Path) -> list[bytes]:
    """Image files under `images`, with their captions in `captions.jsonl`."""
    folder = scratch / "images"
    folder.mkdir(exist_ok=True)
    files = [photo(number) for number in range(IMAGES)]
    records = []
    for number, data in enumerate(files):
        (folder / f"{number}.jpg").write_bytes(data)
        records.append(
            {"image": f"images/{number}.jpg", "text": f"Coloured areas with grain over them, number {number}."}
        )
    _write(scratch / "captions.jsonl", records)
    return files


def documents(scratch: Path, *, copies: int, count: int = DOCUMENTS) -> list[str]:
    """Documents of the machine's own text in the lengths of web pages, and a tokenizer trained on them."""
    source = scratch / "source"
    if not source.is_dir():
        output("data_tools.build_corpus", "text", "--output", source, "--size", 12_000_000)
    whole = [json.loads(line)["text"] for line in (source / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    if not (scratch / "tokenizer").is_dir():
        save_tokenizer(train_tokenizer(whole, phrases=(), vocab_size=VOCABULARY), scratch / "tokenizer")
    texts = list(_pieces("\n\n".join(whole), count=count))
    _write(scratch / "text.jsonl", ({"text": piece} for _ in range(copies) for piece in texts))
    return texts


def documents_and_sources(scratch: Path, *, count: int) -> Path:
    """A folder with `count` documents of which no part occurs twice, and the tokenizer of `documents`.

    The machine's own text comes between Python sources of installed packages, because it has too little of the former.
    """
    documents(scratch, copies=1)
    folder = scratch / "large"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer").symlink_to(scratch / "tokenizer")
    whole = [json.loads(line)["text"] for line in (scratch / "source/text.jsonl").read_text("utf-8").splitlines()]
    draw = random.Random(0)
    sources = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    draw.shuffle(sources)
    # Packages have copies of each other's files.
    found, size = dict.fromkeys(whole), sum(map(len, whole))
    for path in sources:
        if size > 1.1 * _MEAN * count:
            break
        text = path.read_text("utf-8", errors="replace")
        size += len(text) * (text not in found)
        found[text] = None
    texts = list(found)
    draw.shuffle(texts)
    content = "\n\n".join(texts)
    pieces = list(_pieces(content, count=count))
    if sum(map(len, pieces)) > len(content):
        raise SystemExit(f"error: {sources[0].parents[1] if sources else sys.prefix}: too few Python sources")
    _write(folder / "text.jsonl", ({"text": piece} for piece in pieces))
    return folder


def _pieces(content: str, *, count: int) -> Iterator[str]:
    """Pieces of lognormal length, about 4 characters a token; the text starts over where it ends."""
    draw, start = np.random.default_rng(0), 0
    for size in (4 * draw.lognormal(6.3, 1.1, count)).astype(int).clip(8, 16_000).tolist():
        start = 0 if start + size > len(content) else start
        yield content[start : start + size] if content[start : start + size].strip() else "blank"
        start += size


def _lengths(captions: int, texts: int) -> tuple[list[int], list[int]]:
    draw = np.random.default_rng(0)
    counts = np.where(draw.random(captions) < 0.85, 1, draw.integers(2, 6, captions))
    with_images = (IMAGE_TOKENS * counts + draw.lognormal(4.2, 1.0, captions)).astype(int).clip(1, S)
    plain = draw.lognormal(6.3, 1.1, texts).astype(int).clip(1, S)
    return [*with_images.tolist(), *plain.tolist()], [*counts.tolist(), *([0] * texts)]


def _write(path: Path, records: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> int:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=tuple(MEASUREMENTS))
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR", help="folder for inputs and outputs")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    print(json.dumps(MEASUREMENTS[options.measurement](options.scratch, repeats=options.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
