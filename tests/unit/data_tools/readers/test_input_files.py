"""Folders, patterns, compressed JSONL and Arrow files as `--input`."""

import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from data_tools.readers import json_file
from data_tools.readers.files import divide_file, entries
from data_tools.readers.input_paths import input_files
from data_tools.readers.record import RecordError
from megavl.config.errors import DataError, UsageError
from tests.unit.data.corpus_files import make_tokenizer, run_preprocess, write_jsonl
from tests.unit.data_tools.format_files import Expected, member, picture, read_back, rejects, shard_bytes, write_tar

TEXTS = [f"A {colour} thing number {number}." for number in range(30) for colour in ("red", "green", "blue")]


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _stream(table: pa.Table, *, rows: int = 7, kind: Any = ipc.new_stream) -> bytes:
    out = io.BytesIO()
    with kind(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return out.getvalue()


def _zstd(data: bytes) -> bytes:
    return pytest.importorskip("backports.zstd").compress(data)


def _report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def test_folders_and_patterns_are_sorted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b/part-1.jsonl", "b/part-0.jsonl.gz", "a.parquet", "c/d/x.JSON", "z.arrow", "t.tar", "n.ndjson.zst"]
    others = ["README.md", ".hidden.jsonl", ".cache/x.jsonl", "a.jpg", "state.json", "b/dataset_info.json", "x.gz"]
    for name in [*names, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert input_files(["."]) == sorted(f"./{name}" for name in names)
    assert input_files(["b/part-*"]) == ["b/part-0.jsonl.gz", "b/part-1.jsonl"]
    assert input_files(["**/*.json*", "b"]) == ["b/part-0.jsonl.gz", "b/part-1.jsonl"]
    assert input_files(["a.parquet", "a.parquet", "gone.jsonl"]) == ["a.parquet", "a.parquet", "gone.jsonl"]
    (tmp_path / "odd[1].jsonl").touch()
    assert input_files(["odd[1].jsonl"]) == ["odd[1].jsonl"]
    for source in ("*.nothing", ".cache", "odd[2].jsonl"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="no file"):
            input_files([source if source != ".cache" else "empty"])


def test_descriptions_and_empty_shards_are_no_input(tmp_path: Path) -> None:
    """As img2dataset and writers of shards leave them."""
    for name in ("00000.tar", "00000.parquet", "00000_stats.json", "part-0.jsonl"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "part-1.jsonl").touch()
    assert [Path(file).name for file in input_files([str(tmp_path)])] == ["00000.tar", "part-0.jsonl"]


def test_files_without_records_are_passed_over(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    text = write_jsonl(folder / "b.jsonl", [{"text": "red"}])
    (folder / "a.jsonl").write_text("\n\n")
    (folder / "c.json").write_text("[]")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "d.parquet")
    # The file that is named is not read again as one of its folder.
    assert run_preprocess([text, folder], tokenizer=tokenizer, output=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert all(
        f"{folder}/{name}: format not recognised (it has no records)" in printed
        for name in ("a.jsonl", "c.json", "d.parquet")
    )
    assert (_report(tmp_path / "out")["records"], len(_report(tmp_path / "out")["inputs"])) == (1, 1)
    text.unlink()
    assert run_preprocess([folder], tokenizer=tokenizer, output=tmp_path / "none") == 2
    assert "d.parquet: format not recognised (it has no records)" in capsys.readouterr().err
    (folder / "e.jsonl").symlink_to("gone")
    assert run_preprocess([folder], tokenizer=tokenizer, output=tmp_path / "none") == 2
    assert "e.jsonl: no such file" in capsys.readouterr().err


def test_parts_of_a_data_set_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"holds test and train files.*name those to train on, such as '.*/train-\*'"):
        input_files([str(tmp_path)])
    assert len(input_files([str(tmp_path / "train-*")])) == 1
    for number, names in enumerate((("train.jsonl", "test.jsonl"), ("train/0.arrow", "validation/0.arrow"))):
        folder = tmp_path / str(number)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        pattern = (r"train\.\*", "train")[number]
        with pytest.raises(UsageError, match=rf"different parts of a data set; name those .*'{folder}/{pattern}'"):
            input_files([str(folder)])


def test_deep_records_are_refused_with_other_column_names(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("[" * 900 + "]" * 900 + '\n{"alt": "red"}\n')
    more = ["--columns", "text=alt"]
    assert run_preprocess([tmp_path / "in.jsonl"], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    # The parser of Python 3.12 and newer reads deeper lists, which are no record.
    reason = "json" if sys.version_info < (3, 12) else "record"
    assert rejects(tmp_path / "out") == [(reason, "in.jsonl:1")]


def test_a_folder_of_all_kinds_is_one_dataset(tokenizer: Path, tmp_path: Path) -> None:
    folder, table = tmp_path / "in", pa.table({"text": TEXTS})
    (folder / "saved").mkdir(parents=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_lines(TEXTS)))
    (folder / "saved/data-00000-of-00001.arrow").write_bytes(_stream(table))
    (folder / "saved/file.arrow").write_bytes(_stream(table, kind=ipc.new_file))
    for name in ("state.json", "dataset_info.json"):
        (folder / "saved" / name).write_text('{"_format_type": null}')
    (folder / "z.jsonl.zst").write_bytes(_zstd(_lines(TEXTS)))
    outs = [tmp_path / f"out{workers}" for workers in (1, 2)]
    for workers, out in enumerate(outs, start=1):
        more = ["--workers", str(workers)]
        assert run_preprocess([folder], tokenizer=tokenizer, output=out, more=more) == 0
    assert shard_bytes(outs[0]) == shard_bytes(outs[1])
    expected = Expected(tokenizer)
    samples = [expected.document(text, position=number) for number, text in enumerate(TEXTS, start=1)]
    assert read_back(outs[0]) == samples * 4
    found = [(Path(item["path"]).name, item["records"]) for item in _report(outs[0])["inputs"]]
    names = ["a.jsonl.gz", "data-00000-of-00001.arrow", "file.arrow", "z.jsonl.zst"]
    assert found == [(name, len(TEXTS)) for name in names]


def test_files_that_are_not_read_are_named(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    names = ["a.csv", "b/c.CSV", "d.tsv", "e.txt.gz", "f.feather", "g.lance/h.lance", "README.md", "part-0", "r.tgz"]
    silent = ["0.jpg", "clip.mp4", ".hidden.csv", "state.json", "00000_stats.json", "empty.jsonl"]
    for name in [*names, *silent[:-1]]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / silent[-1]).touch()
    text = write_jsonl(folder / "text.jsonl", [{"text": "red"}])
    write_tar(folder / "0.tar", [member("0.png", picture(0)), member("0.txt", b"red")])
    (folder / "0.parquet").write_bytes(b"described again")
    more = ["--dry-run"]
    for source in (folder, f"{tmp_path}/i*"):
        assert run_preprocess([source], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
        found = "2 .csv, 1 .feather, 1 .lance, 1 .md, 1 .parquet beside .tar, 1 .tgz, 1 .tsv, 1 .txt.gz, 1 without an"
        assert f"files of the folders that are not read: {found}" in capsys.readouterr().out, source
    assert run_preprocess([folder], tokenizer=tokenizer, output=tmp_path / "out") == 0
    made = _report(tmp_path / "out")["files_left_out"]
    assert (made[".csv"], made[".txt.gz"], made["without an extension"], len(made)) == (2, 1, 1, 9)
    # A new file of another kind is no other input.
    (folder / "late.csv").touch()
    assert run_preprocess([folder], tokenizer=tokenizer, output=tmp_path / "out") == 0
    assert run_preprocess([text], tokenizer=tokenizer, output=tmp_path / "alone") == 0
    assert _report(tmp_path / "alone")["files_left_out"] == {}


def test_tables_are_known_by_their_first_bytes(tokenizer: Path, tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS})
    parquet.write_table(table, tmp_path / "a.pq")
    parquet.write_table(table, tmp_path / "b.parquet.gzip", compression="gzip")
    feather.write_feather(table, str(tmp_path / "c.feather"))
    assert run_preprocess([tmp_path], tokenizer=tokenizer, output=tmp_path / "out") == 0
    assert _report(tmp_path / "out")["samples"] == 3 * len(TEXTS)


def test_a_folder_of_other_files_names_them(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.csv", "c.txt.gz", "d.jpg"):
        (tmp_path / "in" / name).write_bytes(b"x")
    assert run_preprocess([tmp_path / "in"], tokenizer=tokenizer, output=tmp_path / "out") == 2
    assert "it holds 2 .csv, 1 .jpg, 1 .txt.gz; convert records to JSONL or Parquet" in capsys.readouterr().err


def test_an_empty_folder_is_an_error(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/README.md").touch()
    assert run_preprocess([tmp_path / "in"], tokenizer=tokenizer, output=tmp_path / "out") == 2
    assert "no file below it ends in .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gz", "zst", "stream", "file"])
def test_limit_and_dry_run_read_only_some(
    kind: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.table({"text": TEXTS})
    data = {
        "gz": lambda: gzip.compress(_lines(TEXTS)),
        "zst": lambda: _zstd(_lines(TEXTS)),
        "stream": lambda: _stream(table),
        "file": lambda: _stream(table, kind=ipc.new_file),
    }[kind]()
    path = tmp_path / "in"
    path.write_bytes(data)
    more = ["--dry-run", "--limit", "10"]
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    assert "estimate for all 90 records" in capsys.readouterr().out
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=["--limit", "10"]) == 0
    assert [sample.position for sample in read_back(tmp_path / "out")] == list(range(1, 11))


@pytest.mark.parametrize("compress", [gzip.compress, _zstd])
def test_damaged_compressed_files_are_named(compress: Any, tmp_path: Path) -> None:
    data = compress(_lines(TEXTS) * 20)
    path = tmp_path / "in"
    middle = bytearray(data)
    middle[len(data) // 2] ^= 0xFF
    for bad in (data[:-9], data[: len(data) // 2], bytes(middle), data + b"trailing"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="in: the compressed file is damaged or cut off"):
            divide_file(str(path), container="json", size=1 << 20)


@pytest.mark.parametrize("compress", [gzip.compress, _zstd])
def test_joined_streams_and_long_lines_are_read(compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_RECORD", 100)
    path = tmp_path / "in"
    # No line feed at the end of the last line.
    path.write_bytes(compress(_lines(["a", "b" * 5000])) + compress(_lines(["c"]) + b'{"text": "d"}'))
    (split,) = divide_file(str(path), container="json", size=1)
    found = [entry.content for entry in entries(split)]
    assert isinstance(found.pop(1), RecordError)
    assert [json.loads(line)["text"] for line in found] == ["a", "c", "d"]
    assert split.records == 4 and (split.start, split.end) == (0, os.path.getsize(path))


def test_a_zstd_file_may_begin_with_a_frame_to_skip(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + _zstd(_lines(TEXTS)))
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 0
    assert len(read_back(tmp_path / "out")) == len(TEXTS)


def test_an_endless_line_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_RECORD", 1 << 20)
    path = tmp_path / "in"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"a" * (1 << 20))
    (split,) = divide_file(str(path), container="json", size=1)
    (entry,) = entries(split)
    assert isinstance(entry.content, RecordError) and entry.content.reason == "record_too_long"


@pytest.mark.parametrize("inner", ["[1, 2]", "PAR1", "array"])
def test_other_compressed_content_is_refused(
    inner: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.json.gz"
    path.write_bytes(
        gzip.compress(json.dumps([{"text": "a"}], indent=1).encode() if inner == "array" else inner.encode())
    )
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") in (2, 3)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{\n "text": "a"\n}\n', "line or item 1 is not valid JSON (Expecting property name"),
        (b'\n{"text":"a"}{"text":"b"}\n', "line or item 2 is not valid JSON (Extra data"),
        (b'{"text":"a"}\r{"text":"b"}\r', "line or item 1 is not valid JSON (Extra data"),
        ('{"text":"a"}\n'.encode("utf-16"), "line or item 1 is not UTF-8 (invalid start byte at byte 0)"),
        (b'{"data": [{"text": "a"}]}\n', "it has keys data"),
    ],
)
def test_a_file_without_records_says_what_it_holds(
    data: bytes, found: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.json").write_bytes(data)
    assert run_preprocess([tmp_path / "in.json"], tokenizer=tokenizer, output=tmp_path / "out") == 2
    assert found in capsys.readouterr().err


def test_arrow_rows_are_those_of_parquet(tokenizer: Path, tmp_path: Path) -> None:
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(9)]
    talks = [[{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": text}] for text in TEXTS[:9]]
    table = pa.table({"id": list(range(9)), "image": images, "conversations": talks})
    parquet.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "in.arrow").write_bytes(_stream(table, rows=4))
    samples = []
    for kind in ("parquet", "arrow"):
        out = tmp_path / kind
        assert run_preprocess([tmp_path / f"in.{kind}"], tokenizer=tokenizer, output=out) == 0
        samples.append(read_back(out))
    assert samples[0] == samples[1] and len(samples[0]) == 9


def test_dictionaries_and_compressed_batches_are_read(tokenizer: Path, tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    options = ipc.IpcWriteOptions(compression="zstd")
    path = tmp_path / "in.arrow"
    path.write_bytes(_stream(table, kind=lambda out, schema: ipc.new_stream(out, schema, options=options)))
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 0
    assert len(read_back(tmp_path / "out")) == len(TEXTS)


def test_a_cut_off_arrow_file_is_named(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (ipc.new_stream, ipc.new_file):
        path = tmp_path / "in.arrow"
        path.write_bytes(_stream(pa.table({"text": TEXTS}), kind=kind)[:-400])
        assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 3
        assert "in.arrow: not a readable Arrow file" in capsys.readouterr().err


def test_hostile_offsets_reject_their_rows(tokenizer: Path, tmp_path: Path) -> None:
    data = bytearray(_stream(pa.table({"text": ["aaaa", "bbbb", "cccc"]})))
    offsets = data.index(b"\0\0\0\0\4\0\0\0\x08\0\0\0\x0c\0\0\0")
    data[offsets + 8 : offsets + 12] = (1 << 30).to_bytes(4, "little")
    path = tmp_path / "in.arrow"
    path.write_bytes(data)
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=["--max-bad-frac", "1"]) == 0
    assert rejects(tmp_path / "out") == [("arrow_damaged", "in.arrow:2"), ("arrow_damaged", "in.arrow:3")]


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image_placeholder>"]
    del content["model"]["vocab"]["<image_placeholder>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.png").write_bytes(picture(1))
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "red"}]
    seen = [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "red"}]
    text = write_jsonl(tmp_path / "text.jsonl", [{"conversations": talk}] * 300)
    early = write_jsonl(tmp_path / "early.jsonl", [{"conversations": talk}, {"image": "a.png", "conversations": seen}])
    late = write_jsonl(
        tmp_path / "late.jsonl", [{"conversations": talk}] * 300 + [{"image": "a.png", "conversations": seen}]
    )
    assert run_preprocess([text], tokenizer=folder, output=tmp_path / "out") == 0
    for path, place in ((early, "early.jsonl:2"), (late, "late.jsonl:301")):
        assert run_preprocess([path], tokenizer=folder, output=tmp_path / path.stem) == 2
        (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "has no <image_placeholder> token" in message and place in message
    assert not (tmp_path / "early").exists()


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("deepseek-ai/deepseek-vl-7b-base", "deepseek-ai/deepseek-vl-7b-base"),
        ("hf://org/name", "org/name"),
        ("https://huggingface.co/deepseek-ai/deepseek-vl-7b-base", "deepseek-ai/deepseek-vl-7b-base"),
        ("gpt2", "gpt2"),
        ("https://huggingface.co/gpt2", "gpt2"),
        ("hf.co/org/name.v2/", "org/name.v2"),
        ("https://huggingface.co/org/name/tree/main", "org/name"),
    ],
)
def test_a_hub_name_is_answered_with_a_command(
    name: str, hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])
    assert run_preprocess([text], tokenizer=name, output=tmp_path / "out") == 2
    folder = hub.rpartition("/")[2]
    expected = f"hf download {hub} --include 'tokenizer*' --local-dir {folder} (then give {folder})"
    assert f"error: {name}: no such tokenizer" in (error := capsys.readouterr().err) and expected in error


@pytest.mark.parametrize("name", ["tok.json", "typo/tok.model", "in/typo", "/gone/tok", "../tok", "a b/c d", "link"])
def test_a_path_that_is_no_hub_name_is_a_missing_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("gone")
    text = write_jsonl(tmp_path / "in/text.jsonl", [{"text": "a"}])
    assert run_preprocess([text], tokenizer=name, output=tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert f"error: {name}: no such tokenizer; give a folder with tokenizer.json" in error and "hf " not in error
