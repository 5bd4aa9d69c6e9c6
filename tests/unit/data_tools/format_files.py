"""Test inputs of every format, and the samples that preprocessing must write for them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from PIL import Image
from transformers import PreTrainedTokenizerFast

from megavl.data.shard import Shard
from megavl.data.table import ReadHandles
from tests.unit.data.corpus_files import IMAGE_TOKENS

IMAGE = "<image_placeholder>"
BOS, EOS, IMAGE_ID = 0, 1, 3


@dataclass(frozen=True)
class Sample:
    """One sample, as both readers return it."""

    ids: list[int]
    supervised: list[bool]
    images: list[bytes]
    position: int


def read_back(out: Path) -> list[Sample]:
    """All samples of a run in the order of shards, read by the stock class and compared with our reader."""
    samples = []
    for entry in json.loads((out / "manifest.json").read_text())["shards"]:
        shard = Shard(out, name=entry["name"], handles=ReadHandles(), sha256=entry["sha256"])
        tokens = IndexedDataset(str(out / f"{entry['name']}.tokens"))
        images = IndexedDataset(str(out / f"{entry['name']}.images")) if entry["images"] else []
        for number in range(len(tokens)):
            ids = np.array(tokens[number]).tolist()
            assert shard.tokens.read(number).tolist() == ids
            files = [np.array(images[image]).tobytes() for image in shard.images_of(number)]
            assert [shard.images.read_bytes(image) for image in shard.images_of(number)] == files
            mask = np.zeros(len(ids), bool)
            for span in shard.spans_of(number):
                mask[span["start"] : span["end"]] = True
            samples.append(
                Sample(ids=ids, supervised=mask.tolist(), images=files, position=int(shard.samples[number]["place"]))
            )
    return samples


class Expected:
    """Builds samples with the Hugging Face tokenizer alone."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def document(self, *parts: str | bytes, position: int) -> Sample:
        """Text and image files in order, between BOS and a supervised EOS."""
        ids, mask = [BOS], [False]
        for part in parts:
            new = self._encode(part) if isinstance(part, str) else [IMAGE_ID] * IMAGE_TOKENS
            ids += new
            mask += [isinstance(part, str)] * len(new)
        images = [part for part in parts if isinstance(part, bytes)]
        return Sample(ids=[*ids, EOS], supervised=[*mask, True], images=images, position=position)

    def conversation(
        self, *rounds: tuple[str, str], position: int, images: Sequence[bytes] = (), system: str = "Be brief."
    ) -> Sample:
        """Rounds of question and answer; the questions hold one IMAGE per image."""
        ids, mask = [BOS], [False]
        lead = f"{system}\n\n"
        for question, answer in rounds:
            prompt = self._encode(f"{lead}User: {question}\n\nAssistant:".replace(IMAGE, IMAGE * IMAGE_TOKENS))
            reply = self._encode(f" {answer}")
            ids += [*prompt, *reply, EOS]
            mask += [False] * len(prompt) + [True] * (len(reply) + 1)
            lead = ""
        return Sample(ids=ids, supervised=mask, images=list(images), position=position)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def picture(number: int, *, kind: str = "PNG", size: tuple[int, int] | None = None) -> bytes:
    """A small image file that differs for every number."""
    out = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 151 % 256)
    Image.new("RGB", size or (20 + number % 7, 24 + number % 5), colour).save(out, kind)
    return out.getvalue()


def noise(number: int, *, side: int = 180) -> bytes:
    """An image file of about 100 KB."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def member(name: str, data: bytes = b"", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A tar member; `changes` are fields of its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in changes.items():
        setattr(info, field, value)
    return info, data


def write_tar(
    path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]], *, format: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def rejects(out: Path) -> list[tuple[str, str]]:
    """Reason and `file:position` of each reject, in order; checks that the report counts the same."""
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(line["reason"], Path(line["record"]).name) for line in lines]
    report = json.loads((out / "report.json").read_text())["rejected"]
    assert {reason: entry["count"] for reason, entry in report.items()} == {
        reason: sum(other == reason for other, _ in found) for reason, _ in found
    }
    return found


def shard_bytes(out: Path) -> dict[str, bytes]:
    """The token and image pairs of a run, by file name."""
    files = [file for pattern in ("*.bin", "*.idx") for file in out.glob(pattern)]
    return {file.name: file.read_bytes() for file in files}
