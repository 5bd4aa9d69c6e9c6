"""Pairs of image and text on disk, as captions or as LLaVA conversations, in a training and a held-out file."""

from __future__ import annotations

import hashlib
import platform
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import PIL

from data_tools.corpus.output import DESCRIPTION, write_json, write_line
from data_tools.corpus.pairs.sources import Dropped
from data_tools.corpus.scripts import Script
from megavl.config.errors import DataError
from megavl.data.image import ImageError, Verification, check_image

Form = Literal["caption", "llava"]
"""Record format, by its name in `preprocess.py --format`."""
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

Prompts = Mapping[Script, Sequence[str]]
"""What a user may ask for, in the language of the text."""

TAGS = ("<image>", "<image_placeholder>")
"""A text that spells one of these would be read as having one more image."""

PER_FOLDER = 1000
"""Images in one folder; file systems grow slow with millions."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its text."""

    source: str
    """What it was made from, as a name for people."""
    image: bytes
    """PNG or JPEG."""
    text: str
    script: Script
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the record, which the preprocessor passes over."""


@dataclass(kw_only=True)
class RecordWriter:
    """Writes `train.jsonl`, `heldout.jsonl` and their images, never the same image twice."""

    folder: Path
    seed: int
    form: Form
    prompts: Prompts
    dropped: Dropped
    category: str
    """Of all records, an id of the taxonomy."""
    verify: Verification = "scaled"
    counts: Counter[str] = field(default_factory=Counter)
    """Records by file name and by script."""
    _seen: set[bytes] = field(default_factory=set)
    _files: dict[Split, TextIO] = field(default_factory=dict)

    def __enter__(self) -> RecordWriter:
        for split in SPLITS:
            self._files[split] = (self.folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, pair: Pair, *, split: Split) -> bool:
        """Write one record, unless its image is damaged or known or its text cannot be told from an image tag."""
        key = hashlib.sha256(pair.image).digest()
        if key in self._seen:
            self.dropped.add("same_image", pair.source)
            return False
        if any(tag in pair.text for tag in TAGS):
            self.dropped.add("image_tag", pair.source)
            return False
        try:
            info = check_image(pair.image, verify=self.verify)
        except ImageError as error:
            self.dropped.add(error.reason, pair.source, str(error))
            return False
        self._seen.add(key)
        number = self.counts[f"{split}.jsonl"]
        identifier = f"{split}-{number:07d}"
        path = f"images/{split}/{number // PER_FOLDER:04d}/{identifier}.{info.format.lower()}"
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(pair.image)
        write_line(self._files[split], {**self._record(identifier, path, pair), **self._notes(pair)})
        self.counts[f"{split}.jsonl"] += 1
        self.counts[pair.script] += 1
        return True

    def _record(self, identifier: str, path: str, pair: Pair) -> dict[str, Any]:
        if self.form == "caption":
            return {"id": identifier, "image": path, "text": pair.text}
        prompt = random.Random(f"prompt/{self.seed}/{identifier}").choice(self.prompts[pair.script])
        turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": pair.text}]
        return {"id": identifier, "image": path, "conversations": turns}

    def _notes(self, pair: Pair) -> dict[str, Any]:
        return {"category": self.category, "source": pair.source, "script": pair.script, **pair.extra}

    def finish(self, *, kind: str, options: Mapping[str, Any], licence: str, packages: Iterable[str]) -> dict[str, int]:
        """Write `corpus.json`; returns the records by file.

        Args:
            kind: the command's name.
            options: settings that the records depend on.
            licence: one sentence on the rights in what was made.
            packages: whose versions the bytes depend on.

        Raises:
            DataError: not one training record was made.
        """
        files = {f"{split}.jsonl": self.counts[f"{split}.jsonl"] for split in SPLITS}
        if not files["train.jsonl"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.counts.items())
            example = next(iter(self.dropped.examples.values()), [""])[0]
            raise DataError(f"{kind}: no training record was made ({reasons}; {example}); give more or other input")
        description = {
            "format": 1,
            "kind": kind,
            "seed": self.seed,
            "records": files,
            "scripts": {script: self.counts[script] for script in ("latin", "chinese")},
            "dropped": self.dropped.summary(),
            "options": {"records": self.form, **options},
            "licences": {"pairs": licence},
            "made_with": {
                "python": platform.python_version(),
                "pillow": PIL.__version__,
                **{name: metadata.version(name) for name in packages},
                "platform": sys.platform,
            },
        }
        write_json(self.folder / DESCRIPTION, description)
        return files


def in_order(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Results in the order of the items, computed by some threads, a few items ahead and no more."""
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
