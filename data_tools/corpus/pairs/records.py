"""Records of image-text pairs on disk: captions or LLaVA conversations, in a training and a held-out file."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from tqdm import tqdm

from data_tools.corpus.output import write_description, write_line
from data_tools.corpus.pairs.sources import Dropped
from data_tools.corpus.scripts import Script
from megavl.config.errors import DataError
from megavl.data.image import ImageError, Verification, check_image

RecordFormat = Literal["caption", "llava"]
"""Record format, as `preprocess.py --format` names it."""
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

Prompts = Mapping[Script, Sequence[str]]
"""Questions of a user, in the language of the text."""

IMAGE_TAGS = ("<image>", "<image_placeholder>")
"""The preprocessor would count one more image in a text that contains one of these."""

IMAGES_PER_FOLDER = 1000
"""File systems slow down with millions of files in one folder."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Options of every pair command, named as on the command line."""

    input: list[Path]
    """Files, folders or JSONL; empty means the documentation of this machine, where the command takes that."""
    records: RecordFormat
    heldout_share: float
    seed: int
    workers: int
    force: bool


@dataclass(frozen=True, kw_only=True)
class PairCommand:
    """What one command writes into every record and into `corpus.json`."""

    name: str
    unit: str
    """What the progress bar counts."""
    category: str
    """Id in the taxonomy."""
    prompts: Prompts
    licence: str
    """One sentence on the rights in the output."""
    packages: tuple[str, ...]
    """Packages whose versions the output depends on."""
    verify: Verification = "scaled"
    unique_code: bool = False
    """Keep only the first pair of those with the same text."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its text."""

    source: str
    """Name of the source, for people."""
    image: bytes
    """PNG or JPEG file."""
    text: str
    script: Script
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the record; the preprocessor ignores them."""


@dataclass(frozen=True, kw_only=True)
class SourceResult:
    """The pairs of one source, and what was dropped while making them."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: Dropped = field(default_factory=Dropped)


@dataclass(kw_only=True)
class RecordWriter:
    """Writes `train.jsonl`, `heldout.jsonl` and their images, never the same image twice."""

    folder: Path
    command: PairCommand
    options: PairOptions
    dropped: Dropped
    counts: Counter[str] = field(default_factory=Counter)
    """Records by file name and by script."""
    _seen: set[bytes] = field(default_factory=set)
    _files: dict[Split, TextIO] = field(default_factory=dict)

    def write_all(
        self, items: Sequence[T], make: Callable[[T], SourceResult], *, split_of: Callable[[T], Split]
    ) -> None:
        """Make the pairs of all items in threads, and write them in the order of the items."""
        for split in SPLITS:
            self._files[split] = (self.folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n")
        try:
            results = in_order(make, items, workers=self.options.workers)
            with tqdm(total=len(items), unit=self.command.unit, desc=self.command.name, disable=None) as progress:
                for item, result in zip(items, results, strict=True):
                    self.dropped.merge(result.dropped)
                    for pair in result.pairs:
                        self._add(pair, split=split_of(item))
                    progress.update()
        finally:
            for file in self._files.values():
                file.close()

    def _add(self, pair: Pair, *, split: Split) -> None:
        """Write one record, unless its image is damaged or known, or its text contains an image tag."""
        image_key = hashlib.sha256(pair.image).digest()
        text_key = hashlib.sha256(" ".join(pair.text.split()).encode()).digest()
        reason = detail = ""
        if self.command.unique_code and text_key in self._seen:
            reason = "same_code"
        elif image_key in self._seen:
            reason = "same_image"
        elif any(tag in pair.text for tag in IMAGE_TAGS):
            reason = "image_tag"
        else:
            try:
                info = check_image(pair.image, verify=self.command.verify)
            except ImageError as error:
                reason, detail = error.reason, str(error)
        if reason:
            self.dropped.add(reason, pair.source, detail)
            return
        self._seen |= {image_key, text_key}
        number = self.counts[f"{split}.jsonl"]
        identifier = f"{split}-{number:07d}"
        path = f"images/{split}/{number // IMAGES_PER_FOLDER:04d}/{identifier}.{info.format.lower()}"
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(pair.image)
        notes = {"category": self.command.category, "source": pair.source, "script": pair.script, **pair.extra}
        write_line(self._files[split], {"id": identifier, "image": path, **self._content(identifier, pair), **notes})
        self.counts[f"{split}.jsonl"] += 1
        self.counts[pair.script] += 1

    def _content(self, identifier: str, pair: Pair) -> dict[str, Any]:
        if self.options.records == "caption":
            return {"text": pair.text}
        prompt = random.Random(f"prompt/{self.options.seed}/{identifier}").choice(self.command.prompts[pair.script])
        turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": pair.text}]
        return {"conversations": turns}

    def finish(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """Write `corpus.json` with the settings of the command; returns the number of records by file.

        Raises:
            DataError: not one training record was made.
        """
        files = {f"{split}.jsonl": self.counts[f"{split}.jsonl"] for split in SPLITS}
        name = self.command.name
        if not files["train.jsonl"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.counts.items())
            example = next(iter(self.dropped.examples.values()), [""])[0]
            raise DataError(f"{name}: no training record was made ({reasons}; {example}); give more or other input")
        details = {
            "scripts": {script: self.counts[script] for script in ("latin", "chinese")},
            "dropped": self.dropped.summary(),
            "options": {"records": self.options.records, **settings},
            "licences": {"pairs": self.command.licence},
        }
        packages = ("pillow", *self.command.packages)
        write_description(
            self.folder, kind=name, seed=self.options.seed, records=files, details=details, packages=packages
        )
        return files


def in_order(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Compute results in threads and yield them in the order of the items, with a bounded prefetch."""
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(function, item) for item in islice(rest, 2 * workers)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(function, item) for item in islice(rest, 1)]
        finally:
            for future in waiting:
                future.cancel()
