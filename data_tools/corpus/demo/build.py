"""Builders of the demo commands of `build_corpus.py`: text, tokenizer, pictures, and all of these together."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data_tools.corpus.demo.picture_set import DETAILS, FAMILIES, Mix, PictureSet, phrases
from data_tools.corpus.demo.questions import CHOICES
from data_tools.corpus.demo.vocabulary import read_texts, save_tokenizer, train_tokenizer
from data_tools.corpus.output import new_folder, write_description, write_json, write_jsonl
from data_tools.corpus.texts import PACKAGES, Document, Summary, collect_text, divide
from megavl.config.errors import DataError

DEMO_MIX: dict[tuple[str, str], float] = {
    ("shapes", "easy"): 15,
    ("charts", "easy"): 12,
    ("ocr", "easy"): 10,
    ("shapes", "hard"): 1,
    ("charts", "hard"): 1,
    ("ocr", "hard"): 1,
}
"""Weights of the levels. Tiny models learn the easy pictures in some hundred steps; the hard ones leave headroom."""

DETAILS_MIX: dict[tuple[str, str], float] = {(DETAILS, "letter"): 6, (DETAILS, "shape"): 6}
"""What `details` adds to these weights."""

EVALUATIONS = {"eval.jsonl": "easy", "eval_hard.jsonl": "hard"}
"""Level of the questions in each file."""
HELDOUT_TEXT = "text_heldout.jsonl"

TEXT_ONLY_SHARE = 0.02
"""Conversations without an image, relative to those with one."""
MAX_TEXT_ANSWER = 60
"""Characters. Long text answers in a tenth of the conversations would already be a third of the loss tokens."""

LICENCES = {
    "pictures": "Pictures, captions and questions are made by this program and carry no rights of others.",
    "text": "Text is copied from this machine, each document under the licence of its source; "
    "see `source` in text.jsonl before passing it on.",
}


def build_text(output: Path, *, seed: int, size: int, debian_root: Path, force: bool) -> dict[str, int]:
    """Write `text.jsonl` with about `size` bytes of text; returns the number of records by file."""
    with new_folder(output, force=force) as folder:
        collection = collect_text(size=size, seed=seed, debian=debian_root)
        counts = {"text.jsonl": write_jsonl(folder / "text.jsonl", _text_records(collection.documents))}
        _describe(folder, kind="text", seed=seed, counts=counts, text=collection.sources)
    return counts


def build_tokenizer(output: Path, *, input: list[Path], vocab_size: int, force: bool, seed: int = 0) -> dict[str, int]:
    """Train a tokenizer on the given files and the questions on pictures; returns its size. The seed has no effect."""
    texts = [text for path in input for text in read_texts(path)]
    if not texts:
        raise DataError(f"--input {', '.join(map(str, input))}: holds no text; give a text.jsonl with records")
    with new_folder(output, force=force) as folder:
        tokenizer = train_tokenizer(texts, phrases=phrases(), vocab_size=vocab_size)
        save_tokenizer(tokenizer, folder)
    return {"vocabulary": tokenizer.get_vocab_size()}


def build_pictures(
    output: Path, *, family: str, level: str, seed: int, samples: int, heldout: int, force: bool
) -> dict[str, int]:
    """Write images, captions, conversations and questions of one family; returns the number of records by file."""
    mix = {(family, name): 1.0 for name in FAMILIES[family] if level in (name, "all")}
    with new_folder(output, force=force) as folder:
        pictures = PictureSet(folder=folder, seed=seed)
        tasks = pictures.add_heldout(list(mix), per_question=heldout)
        pictures.add_training(mix, count=samples)
        counts = {
            "captions.jsonl": write_jsonl(folder / "captions.jsonl", pictures.captions),
            "conversations.json": len(pictures.conversations),
            "eval.jsonl": write_jsonl(folder / "eval.jsonl", tasks),
        }
        write_json(folder / "conversations.json", pictures.conversations)
        _describe(folder, kind=family, seed=seed, counts=counts, mix=mix, tasks={"eval.jsonl": tasks})
    return counts


def build_demo(
    output: Path,
    *,
    seed: int,
    samples: int,
    heldout: int,
    size: int,
    vocab_size: int,
    debian_root: Path,
    force: bool,
    heldout_text: int = 0,
    packages: bool = False,
    details: bool = False,
    side: int | None = None,
) -> dict[str, int]:
    """Write the whole demo corpus: text, tokenizer, pictures of every family, and held-out questions.

    Args:
        output: output folder.
        seed: random seed; the same seed on the same machine gives the same bytes.
        samples: number of training pictures.
        heldout: held-out questions of each kind, each with a picture of its own.
        size: bytes of text.
        vocab_size: entries of the tokenizer.
        debian_root: folder with Debian's documentation; may be absent.
        force: replace an earlier result.
        heldout_text: bytes of further text for `text_heldout.jsonl`; 0 writes no such file.
        packages: read the docstrings of installed packages where other text does not suffice.
        details: add small marks to the training pictures, and questions on them in `eval_detail.jsonl`.
        side: longest side of the images, pixels; None leaves them as they are drawn.

    Returns:
        Number of records by file.
    """
    with new_folder(output, force=force) as folder:
        collection = collect_text(
            size=size + heldout_text, seed=seed, debian=debian_root, packages=PACKAGES if packages else None
        )
        collection, kept_back = divide(collection, kept_back=heldout_text)
        pictures = PictureSet(folder=folder, seed=seed, side=side)
        asked = {name: [(family, level) for family in FAMILIES] for name, level in EVALUATIONS.items()}
        if details:
            asked["eval_detail.jsonl"] = list(DETAILS_MIX)
        tasks = {name: pictures.add_heldout(levels, per_question=heldout) for name, levels in asked.items()}
        mix = DEMO_MIX | DETAILS_MIX if details else DEMO_MIX
        pictures.add_training(mix, count=samples)
        text_only = _text_only(collection.summaries, count=round(samples * TEXT_ONLY_SHARE), seed=seed)
        conversations = [*pictures.conversations, *text_only]
        random.Random(f"conversations/{seed}").shuffle(conversations)
        captions = [record["text"] for record in pictures.captions]
        turns = [turn["value"].replace("<image>", "") for talk in conversations for turn in talk["conversations"]]
        texts: Iterable[str] = chain((document.text for document in collection.documents), captions, turns)
        tokenizer = train_tokenizer(texts, phrases=phrases(), vocab_size=vocab_size)
        save_tokenizer(tokenizer, folder / "tokenizer")
        write_json(folder / "conversations.json", conversations)
        counts = {
            "text.jsonl": write_jsonl(folder / "text.jsonl", _text_records(collection.documents)),
            "captions.jsonl": write_jsonl(folder / "captions.jsonl", pictures.captions),
            "conversations.json": len(conversations),
            **{name: write_jsonl(folder / name, records) for name, records in tasks.items()},
            "tokenizer": tokenizer.get_vocab_size(),
        }
        if heldout_text:
            counts[HELDOUT_TEXT] = write_jsonl(folder / HELDOUT_TEXT, _text_records(kept_back))
        _describe(folder, kind="demo", seed=seed, counts=counts, mix=mix, tasks=tasks, text=collection.sources)
    return counts


def _text_records(documents: Iterable[Document]) -> Iterator[dict[str, str]]:
    for number, document in enumerate(documents):
        yield {"id": f"text-{number:06d}", "source": document.source, "text": document.text}


def _text_only(summaries: list[Summary], *, count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations without an image, about functions of the standard library."""
    short = [summary for summary in summaries if len(summary.text) <= MAX_TEXT_ANSWER]
    chosen = random.Random(f"summaries/{seed}").sample(short, min(count, len(short)))
    return [
        {
            "id": f"text-{number:06d}",
            "conversations": [
                {"from": "human", "value": f"What does {summary.name} do?"},
                {"from": "gpt", "value": summary.text},
            ],
        }
        for number, summary in enumerate(chosen)
    ]


def _describe(
    folder: Path,
    *,
    kind: str,
    seed: int,
    counts: dict[str, int],
    mix: Mix | None = None,
    tasks: dict[str, list[dict[str, Any]]] | None = None,
    text: dict[str, dict[str, int]] | None = None,
) -> None:
    """Write `corpus.json`."""
    details: dict[str, Any] = {}
    if mix:
        details["mix"] = {f"{family}.{level}": weight for (family, level), weight in mix.items()}
    if tasks:
        details["chance"] = 1 / CHOICES
        details["questions"] = {
            name: dict(sorted(Counter(task["kind"] for task in records).items())) for name, records in tasks.items()
        }
    if text:
        details["text"] = text
    details["licences"] = {key: LICENCES[key] for key, given in (("pictures", mix), ("text", text)) if given}
    packages = ("pillow", "tokenizers")
    write_description(folder, kind=kind, seed=seed, records=counts, details=details, packages=packages)
