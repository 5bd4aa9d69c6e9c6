"""A byte that changed on disk, anywhere in a dataset: refused by name, never a crash, never other tokens in silence."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools import verify
from megavl.config.errors import DataError
from megavl.data.dataset import Dataset
from megavl.data.image import ImageError
from megavl.data.image_worker import load_canvas
from megavl.data.manifest import MODALITIES, DatasetManifest, Modality, ShardManifest, read_manifest
from megavl.data.table import ReadHandles
from tests.unit.data.corpus_files import GEOMETRY, make_corpus, make_tokenizer, open_small, run_preprocess

FLIPS = [60, pytest.param(500, marks=pytest.mark.slow)]
BESIDE = ("job.json", "report.json", "rejects.jsonl")
"""How the dataset was made; nothing that is trained on."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer(root / "tokenizer")
    assert run_preprocess(make_corpus(root, images=9, texts=12), tokenizer=tokenizer, output=root / "out") == 0
    return root / "out", tokenizer


def files_of(out: Path) -> list[Path]:
    return [path for path in sorted(out.iterdir()) if path.is_file() and path.name not in BESIDE]


class Flipped:
    """One byte of a file, changed for the length of a `with` block."""

    def __init__(self, path: Path, draw: random.Random) -> None:
        self.path, self.clean = path, path.read_bytes()
        self.place, self.change = draw.randrange(len(self.clean)), draw.randrange(1, 256)

    def __enter__(self) -> str:
        data = bytearray(self.clean)
        data[self.place] ^= self.change
        self.path.write_bytes(data)
        return f"{self.path.name}, byte {self.place} ^ {self.change}"

    def __exit__(self, *_: Any) -> None:
        self.path.write_bytes(self.clean)


@pytest.mark.parametrize("flips", FLIPS)
def test_damage_is_named_at_open_and_verify(
    made: tuple[Path, Path], flips: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokenizer = made
    draw, files = random.Random(flips), files_of(out)
    assert {path.suffix for path in files} == {".bin", ".idx", ".npy", ".json"}
    for number in range(flips):
        # Every file in turn: by size alone, nearly all flips would land in images.
        with Flipped(files[number % len(files)], draw) as what:
            name = what.split(",")[0]
            with pytest.raises(DataError) as caught:
                open_small(out, tokenizer=tokenizer)
            assert name in str(caught.value), f"{what}: {caught.value}"
            assert verify.main([str(out)]) == 3, what
            assert name in capsys.readouterr().err, what
    assert verify.main([str(out)]) == 0


def spellings(text: str) -> dict[str, str]:
    """The same JSON content in other bytes."""
    return {
        "tab": text.replace("\n ", "\n\t", 1),
        "carriage return": text.replace("\n", "\r", 1),
        "space for line feed": text[:-1] + " ",
        "no line feed": text[:-1],
        "compact": json.dumps(json.loads(text)),
        "escaped letter": text.replace('"megavl', '"\\u006degavl', 1),
        "number": re.sub(r'("seq_length": )(\d+)', r"\1\2e0", text, count=1),
        "key twice": text.replace("{\n", '{\n "version": 0,\n', 1),
    }


@pytest.mark.parametrize("name", ["manifest.json", "text-00000.json", "multimodal-00001.json"])
def test_a_manifest_in_another_spelling_is_refused(
    made: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokenizer = made
    path = out / name
    clean = path.read_bytes()
    for what, text in spellings(clean.decode()).items():
        assert text.encode() != clean and (what == "number" or json.loads(text) == json.loads(clean)), what
        path.write_bytes(text.encode())
        try:
            with pytest.raises(DataError) as caught:
                open_small(out, tokenizer=tokenizer)
            assert name in str(caught.value), what
            assert verify.main([str(out)]) == 3, what
            assert name in capsys.readouterr().err, what
            kind = DatasetManifest if name == "manifest.json" else ShardManifest
            with pytest.raises(DataError, match=name):
                read_manifest(path, kind=kind)
        finally:
            path.write_bytes(clean)


def read_all(dataset: Dataset) -> dict[tuple[Modality, int], tuple[np.ndarray, list[np.ndarray | None], list[str]]]:
    """Tokens, canvases (None: refused) and reported damage of every sequence."""
    handles, found = ReadHandles(), {}
    for modality in MODALITIES:
        for index in range(dataset.counts[0][modality]):
            packed = dataset.read(source=0, modality=modality, index=index)
            canvases: list[np.ndarray | None] = []
            for image in (image for member in packed.members for image in member.images):
                try:
                    canvases.append(load_canvas(image, geometry=GEOMETRY, handles=handles))
                except ImageError:
                    canvases.append(None)
            found[modality, index] = packed.tokens, canvases, [member.damage for member in packed.members]
    return found


@pytest.mark.parametrize("flips", FLIPS)
def test_damage_is_found_when_read_without_hashing(made: tuple[Path, Path], flips: int) -> None:
    out, tokenizer = made
    draw = random.Random(flips + 1)
    files = [path for path in files_of(out) if path.suffix == ".bin"]
    good = read_all(open_small(out, tokenizer=tokenizer))
    for number in range(flips // 3):
        with Flipped(files[number % len(files)], draw) as what:
            found = read_all(open_small(out, tokenizer=tokenizer, skip_hash=True))
            refused = 0
            for key, (tokens, canvases, damage) in found.items():
                before, pictures, _ = good[key]
                refused += sum(canvas is None for canvas in canvases) + sum(map(bool, damage))
                assert np.array_equal(tokens, before) or any(damage), what
                for canvas, picture in zip(canvases, pictures, strict=True):
                    assert canvas is None or np.array_equal(canvas, picture), what
            assert refused, what
    # Tables and index files are hashed all the same.
    for path in files_of(out):
        if path.suffix in (".npy", ".idx"):
            with Flipped(path, draw), pytest.raises(DataError, match=path.name):
                open_small(out, tokenizer=tokenizer, skip_hash=True)
