"""Inputs of every kind: any number of workers, any number of array tasks, and a resumed run give the same bytes."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import verify
from data_tools.pipeline import job
from data_tools.readers.files import divide_file, entries
from data_tools.readers.formats import Container
from megavl.data.dataset import Source
from megavl.data.table import ReadHandles
from tests.unit.data.corpus_files import run_preprocess, write_jsonl
from tests.unit.data_tools.format_files import member, noise, picture, rejects, write_tar

COUNT = 12


@pytest.fixture(scope="module", autouse=True)
def small_splits() -> Iterator[None]:
    """Several shards for a megabyte of images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(job._SPLIT_BYTES, "images", (256 << 10, 256 << 20))
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tar archive and a table of 1 MB each, and JSON files; each has a fault."""
    root = tmp_path_factory.mktemp("in")
    images = [noise(number) for number in range(COUNT)]
    keyed = [(member(f"{n}.png", data), member(f"{n}.txt", b"A thing.")) for n, data in enumerate(images)]
    tar = [part for pair in keyed for part in pair]
    tar += [member("3.txt", b"comes back"), member("link.png", type=tarfile.SYMTYPE, linkname="0.png")]
    write_tar(root / "a.tar", tar)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": data, "path": None} for data in images], struct)
    texts = ["A thing." if number != 5 else " " for number in range(COUNT)]
    pq.write_table(pa.table({"image": column, "text": texts}), root / "b.parquet", row_group_size=2)
    for number in range(COUNT):
        (root / f"{number}.png").write_bytes(picture(number))
    talks = [_talk(f"{number}.png") for number in range(COUNT)]
    documents = [_document(number) for number in range(COUNT)]
    return [
        root / "a.tar",
        root / "b.parquet",
        write_jsonl(root / "c.jsonl", [*talks, _talk("gone.png")]),
        write_jsonl(root / "d.jsonl", documents),
    ]


def _talk(name: str) -> dict[str, object]:
    question = [{"type": "image", "image": name}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]
    # Nothing reads the note: it makes a few records fill a split.
    return {"note": "x" * 20_000, "messages": messages}


def _document(number: int) -> dict[str, object]:
    info = [{"image_name": f"{n}.png", "matched_text_index": n % 3} for n in (number, 99)]
    return {"text_list": ["One.", "Two.", "Three."], "image_info": info, "note": "x" * 20_000}


def _content(out: Path) -> dict[str, bytes]:
    names = [file for file in out.rglob("*") if file.is_file() and "lock" not in file.name]
    return {str(file.relative_to(out)): file.read_bytes() for file in names}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], tokenizer: Path) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    assert run_preprocess(inputs, tokenizer=tokenizer, output=out) == 0
    return out


def test_every_input_becomes_several_shards(made: Path, inputs: list[Path]) -> None:
    shards = Source(made, handles=ReadHandles()).shards
    names = [shard.manifest.sources[0].name for shard in shards]
    assert {name: names.count(name) > 2 for name in names} == {str(path): True for path in inputs}
    assert {shard.manifest.sources[0].places for shard in shards} == {"member", "row", "line"}
    counts = verify.verify(str(made))
    assert counts["images"] == 11 + 11 + 12 + 12
    assert sorted(rejects(made)) == [
        *(("empty_text", "b.parquet:6"), ("image_missing", "c.jsonl:13"), ("tar_link", "a.tar:26")),
        *(("tar_unsorted", "a.tar:25"), ("tar_unsorted", "a.tar:7")),
    ]
    assert json.loads((made / "report.json").read_text())["images_without_file"] == COUNT


def test_two_workers_give_the_same_bytes(made: Path, inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    assert run_preprocess(inputs, tokenizer=tokenizer, output=tmp_path / "out", more=["--workers", "2"]) == 0
    assert _content(tmp_path / "out") == _content(made)


def test_three_array_tasks_give_the_same_bytes(made: Path, inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    for task in (1, 2, 0):
        more = ["--task", str(task), "--num-tasks", "3"]
        assert run_preprocess(inputs, tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    assert _content(tmp_path / "out") == _content(made)


def test_lost_shards_are_made_again(
    made: Path, inputs: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_preprocess(inputs, tokenizer=tokenizer, output=out) == 0
    shards = sorted(out.glob("multimodal-*.images.bin"))
    for lost in (shards[1], shards[4]):
        lost.unlink()
    (out / "units" / "00007.json").unlink()
    capsys.readouterr()
    assert run_preprocess(inputs, tokenizer=tokenizer, output=out) == 0
    total = len(list(out.glob("units/[0-9]*[0-9].json")))
    assert f"{total - 3} of {total} shards are done already" in capsys.readouterr().out
    assert _content(out) == _content(made)


def test_limit_counts_keys_and_rows(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    # Twelve keys, one that comes back, one link: fourteen records.
    more = ["--limit", "19"]
    assert run_preprocess(inputs, tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["records"] for entry in report["inputs"]] == [14, 5, 0, 0]


@pytest.mark.parametrize(("name", "container"), [("a.tar", "tar"), ("b.parquet", "parquet")])
def test_any_split_size_gives_the_same_records(inputs: list[Path], name: str, container: Container) -> None:
    path = str(inputs[0].parent / name)
    whole = [entry for split in divide_file(path, container=container, size=1 << 40) for entry in entries(split)]
    draw = np.random.default_rng(0)
    for size in (1, *draw.integers(1, 600_000, 6).tolist()):
        splits = divide_file(path, container=container, size=size)
        parts = [list(entries(split)) for split in splits]
        assert [str(entry) for part in parts for entry in part] == [str(entry) for entry in whole]
        assert [len(part) for part in parts] == [split.records for split in splits]
        assert all(a.end <= b.start for a, b in zip(splits, splits[1:]))
    assert len(divide_file(path, container=container, size=1)) > 5
