"""What each `build_corpus.py` command puts into its folder."""

from __future__ import annotations

import platform
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import PIL
import tokenizers

from data_tools.corpus.demo.pictures import FAMILIES, Mix, PictureSet, phrases
from data_tools.corpus.demo.questions import CHOICES
from data_tools.corpus.demo.texts import Collection, Summary, collect_text
from data_tools.corpus.demo.vocabulary import read_texts, save_tokenizer, train_tokenizer
from data_tools.corpus.output import DESCRIPTION, new_folder, write_json, write_jsonl
from megavl.config.errors import DataError

DEMO_MIX: Mix = {
    ("shapes", "easy"): 15,
    ("charts", "easy"): 12,
    ("ocr", "easy"): 10,
    ("shapes", "hard"): 1,
    ("charts", "hard"): 1,
    ("ocr", "hard"): 1,
}
"""Mostly easy pictures: the tiny presets learn these within some hundred steps; the hard ones leave room above."""

TEXT_ONLY_SHARE = 0.02
LONGEST_TEXT_ANSWER = 60
"""Conversations without an image, as a share of those with one, and the characters of their longest answer. Long ones
in a tenth of all conversations would be a third of the loss tokens, on which the tiny model would spend its steps."""

LICENCES = {
    "pictures": "Pictures, captions and questions are made by this program and carry no rights of others.",
    "text": "Text is copied from this machine, each document under the licence of its source; "
    "see `source` in text.jsonl before passing it on.",
}


def build_text(output: Path, *, seed: int, size: int, debian: Path, force: bool) -> dict[str, int]:
    """Write `text.jsonl` with about `size` bytes of text; returns counts by file."""
    with new_folder(output, force=force) as folder:
        collection = collect_text(size=size, seed=seed, debian=debian)
        counts = {"text.jsonl": write_jsonl(folder / "text.jsonl", _text_records(collection))}
        _describe(folder, kind="text", seed=seed, counts=counts, text=collection.sources)
    return counts


def build_tokenizer(output: Path, *, inputs: list[Path], vocab_size: int, force: bool) -> dict[str, int]:
    """Train a tokenizer on the given files and the pictures' questions; returns its size."""
    texts = [text for path in inputs for text in read_texts(path)]
    if not texts:
        raise DataError(f"--input {', '.join(map(str, inputs))}: holds no text; give a text.jsonl with records")
    with new_folder(output, force=force) as folder:
        tokenizer = train_tokenizer(texts, phrases=phrases(), vocab_size=vocab_size)
        save_tokenizer(tokenizer, folder)
    return {"vocabulary": tokenizer.get_vocab_size()}


def build_pictures(
    output: Path, *, family: str, levels: list[str], seed: int, samples: int, heldout: int, force: bool
) -> dict[str, int]:
    """Write images, captions, conversations and questions of one family; returns counts by file."""
    mix = {(family, level): 1.0 for level in levels}
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
    output: Path, *, seed: int, samples: int, heldout: int, size: int, vocab_size: int, debian: Path, force: bool
) -> dict[str, int]:
    """Write the whole small corpus: text, tokenizer, pictures of every family, and held-out questions.

    Args:
        output: the folder to make.
        seed: decides every choice; the same seed on the same machine gives the same bytes.
        samples: training pictures.
        heldout: questions of each kind, with one held-out picture each.
        size: bytes of text.
        vocab_size: entries of the tokenizer.
        debian: folder with Debian's documentation; may be absent.
        force: replace an earlier result.

    Returns:
        Records by file.
    """
    with new_folder(output, force=force) as folder:
        collection = collect_text(size=size, seed=seed, debian=debian)
        pictures = PictureSet(folder=folder, seed=seed)
        tasks = {
            name: pictures.add_heldout([(family, level) for family in FAMILIES], per_question=heldout)
            for name, level in (("eval.jsonl", "easy"), ("eval_hard.jsonl", "hard"))
        }
        pictures.add_training(DEMO_MIX, count=samples)
        talks = _text_only(collection.summaries, count=round(samples * TEXT_ONLY_SHARE), seed=seed)
        conversations = [*pictures.conversations, *talks]
        random.Random(f"conversations/{seed}").shuffle(conversations)
        captions = [record["text"] for record in pictures.captions]
        spoken = [turn["value"].replace("<image>", "") for talk in conversations for turn in talk["conversations"]]
        texts: Iterable[str] = chain((document.text for document in collection.documents), captions, spoken)
        tokenizer = train_tokenizer(texts, phrases=phrases(), vocab_size=vocab_size)
        save_tokenizer(tokenizer, folder / "tokenizer")
        write_json(folder / "conversations.json", conversations)
        counts = {
            "text.jsonl": write_jsonl(folder / "text.jsonl", _text_records(collection)),
            "captions.jsonl": write_jsonl(folder / "captions.jsonl", pictures.captions),
            "conversations.json": len(conversations),
            **{name: write_jsonl(folder / name, records) for name, records in tasks.items()},
            "tokenizer": tokenizer.get_vocab_size(),
        }
        _describe(folder, kind="demo", seed=seed, counts=counts, mix=DEMO_MIX, tasks=tasks, text=collection.sources)
    return counts


def _text_records(collection: Collection) -> Iterator[dict[str, str]]:
    for number, document in enumerate(collection.documents):
        yield {"id": f"text-{number:06d}", "source": document.source, "text": document.text}


def _text_only(summaries: list[Summary], *, count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations without an image, about functions of the standard library."""
    short = [summary for summary in summaries if len(summary.text) <= LONGEST_TEXT_ANSWER]
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
    """Write `corpus.json`: what the folder holds and where it came from."""
    description: dict[str, Any] = {"format": 1, "kind": kind, "seed": seed, "records": counts}
    if mix:
        description["mix"] = {f"{family}.{level}": weight for (family, level), weight in mix.items()}
    if tasks:
        description["chance"] = 1 / CHOICES
        description["questions"] = {
            name: dict(sorted(Counter(task["kind"] for task in records).items())) for name, records in tasks.items()
        }
    if text:
        description["text"] = text
    description["licences"] = {key: LICENCES[key] for key, given in (("pictures", mix), ("text", text)) if given}
    description["made_with"] = {
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "tokenizers": tokenizers.__version__,
        "platform": sys.platform,
    }
    write_json(folder / DESCRIPTION, description)
