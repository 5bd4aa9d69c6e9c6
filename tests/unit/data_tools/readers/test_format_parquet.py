"""Parquet tables: images with text or conversations, damage, and a missing library."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data.corpus_files import arguments, run_preprocess
from tests.unit.data_tools.format_files import IMAGE, Expected, noise, picture, read_back, rejects, shard_bytes

ROOT = Path(__file__).parents[4]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TALK = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "red"}]


def _run(path: Path, tokenizer: Path, *more: str, code: int = 0) -> Path:
    out = path.with_suffix("")
    more = ("--max-bad-frac", "0.95", *more)
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=more) == code
    return out


def _write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def _image(number: int, **change: Any) -> dict[str, Any]:
    return {"bytes": picture(number), "path": f"{number}.png", **change}


def test_captions_with_image_structs_are_read(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "7.png").write_bytes(picture(7))
    images = [_image(0), _image(1, path=None), {"bytes": None, "path": "7.png"}]
    columns = {
        "image": pa.array(images, STRUCT),
        "caption": ["One.", "Two\n<image>", "Four."],
        "other": [1, 2, 3],
    }
    out = _run(_write(tmp_path / "in.parquet", columns, row_group_size=2), tokenizer)
    assert "format parquet (recognised), template deepseek" in capsys.readouterr().out
    expect = Expected(tokenizer).document
    assert read_back(out) == [
        expect(picture(0), "One.", position=1),
        expect("Two", picture(1), position=2),
        expect(picture(7), "Four.", position=3),
    ]


def test_conversations_and_messages_are_read(tokenizer: Path, tmp_path: Path) -> None:
    images = pa.array([[_image(0)], [], [_image(1), _image(2)], None], pa.list_(STRUCT))
    turns = [
        TALK,
        [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}],
        [{"from": "human", "value": "<image>A<image>"}, {"from": "gpt", "value": "B"}],
        [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "No."}],
    ]
    expect = Expected(tokenizer).conversation
    expected = {
        1: expect((f"{IMAGE}Which?", "red"), position=1, images=[picture(0)]),
        2: expect(("Hm?", "Yes."), position=2),
        3: expect((f"{IMAGE}A{IMAGE}", "B"), position=3, images=[picture(1), picture(2)]),
        4: expect(("Hm?", "No."), position=4),
    }
    llava = _run(_write(tmp_path / "llava.parquet", {"images": images, "conversations": turns}), tokenizer)
    assert {sample.position: sample for sample in read_back(llava)} == expected

    roles = {"human": ("User", "user"), "gpt": ("Assistant", "assistant")}
    spelled = [[{"role": roles[t["from"]][0], "content": t["value"]} for t in talk] for talk in turns]
    deepseek = _run(_write(tmp_path / "deepseek.parquet", {"images": images, "conversations": spelled}), tokenizer)
    assert {sample.position: sample for sample in read_back(deepseek)} == expected

    spelled = [[{"role": roles[t["from"]][1], "content": t["value"]} for t in talk] for talk in turns]
    messages = _run(_write(tmp_path / "messages.parquet", {"images": images, "messages": spelled}), tokenizer)
    assert {sample.position: sample for sample in read_back(messages)} == expected


def test_messages_with_parts_are_read(tokenizer: Path, tmp_path: Path) -> None:
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", STRUCT)])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    user = [
        {"type": "text", "text": "A", "image": None},
        {"type": "image", "text": None, "image": _image(3)},
        {"type": "image", "text": None, "image": None},
    ]
    talk = [{"role": "user", "content": user}, {"role": "assistant", "content": [{"type": "text", "text": "B"}]}]
    columns = {"messages": pa.array([talk], pa.list_(message)), "images": pa.array([[_image(4)]], pa.list_(STRUCT))}
    out = _run(_write(tmp_path / "in.parquet", columns), tokenizer)
    question = (f"A{IMAGE}{IMAGE}", "B")
    assert read_back(out) == [Expected(tokenizer).conversation(question, position=1, images=[picture(3), picture(4)])]


def test_text_columns_of_other_types_are_read(tokenizer: Path, tmp_path: Path) -> None:
    expect = Expected(tokenizer).document
    texts = pa.array(["Words <image>.", "More."], pa.large_string())
    out = _run(_write(tmp_path / "text.parquet", {"text": texts}), tokenizer)
    assert read_back(out) == [expect("Words <image>.", position=1), expect("More.", position=2)]
    columns = {"text": pa.array(["Red.", "Red."]).dictionary_encode(), "image": pa.array([picture(1), picture(2)])}
    out = _run(_write(tmp_path / "plain.parquet", columns), tokenizer)
    assert read_back(out) == [expect(picture(1), "Red.", position=1), expect(picture(2), "Red.", position=2)]


def test_times_inside_structs_and_lists_lose_no_row(tokenizer: Path, tmp_path: Path) -> None:
    # Python has no times of this precision.
    time = pa.timestamp("ns")
    columns = {
        "text": ["Red.", "Blue."],
        "meta": pa.array([{"at": 1, "by": "x"}] * 2, pa.struct([("at", time), ("by", pa.string())])),
        "steps": pa.array([[{"at": 1}], None], pa.list_(pa.struct([("at", time)]))),
    }
    samples = read_back(_run(_write(tmp_path / "in.parquet", columns), tokenizer))
    expect = Expected(tokenizer).document
    assert samples == [expect("Red.", position=1), expect("Blue.", position=2)]


def test_obelics_tables_are_read(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "map.tsv").write_text("https://example.org/1\t1.png\n")
    columns = {
        "images": [["https://example.org/1", None, "https://example.org/2"], [None]],
        "texts": [[None, "One.", None], ["Two."]],
        "metadata": ["[]", "[]"],
    }
    path = _write(tmp_path / "in.parquet", columns)
    out = _run(path, tokenizer, "--image-map", str(tmp_path / "map.tsv"))
    assert "format obelics (recognised), template plain" in capsys.readouterr().out
    expect = Expected(tokenizer).document
    found = {sample.position: sample for sample in read_back(out)}
    assert found == {1: expect(picture(1), "One.", position=1), 2: expect("Two.", position=2)}


def test_bad_rows_leave_the_others_unchanged(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "7.png").write_bytes(picture(7))
    rows: list[tuple[str, dict[str, Any] | None, str | bytes | None]] = [
        ("", _image(0), "good"),
        ("", None, "no image, so text alone"),
        ("image_missing", {"bytes": None, "path": "gone.png"}, "x"),
        ("", {"bytes": None, "path": None}, "likewise"),
        ("image_outside_root", {"bytes": None, "path": "../secret.png"}, "x"),
        ("image_outside_root", {"bytes": None, "path": "/etc/passwd"}, "x"),
        ("image_empty", _image(1, bytes=b""), "x"),
        ("image_truncated", _image(1, bytes=picture(1, size=(90, 90))[:-20]), "x"),
        ("image_format", _image(1, bytes=b"<svg/>"), "x"),
        ("image_format", _image(1, bytes=b"%!PS-Adobe-3.0 EPSF-3.0\n"), "x"),
        ("image_aspect", _image(1, bytes=picture(1, size=(1, 200_000))), "x"),
        ("", _image(3), "tags in a caption are text: <image> and <image>"),
        ("empty_text", _image(1), " "),
        ("empty_text", _image(1), None),
        ("encoding", _image(1), b"\xff\xfe"),
        ("", _image(2), "good too"),
    ]
    texts = pa.array([text.encode() if isinstance(text, str) else text for _, _, text in rows], pa.binary())
    columns = {"image": pa.array([image for _, image, _ in rows], STRUCT), "text": texts.view(pa.string())}
    mixed = _run(_write(tmp_path / "mixed.parquet", columns), tokenizer)
    found = [(reason, f"mixed.parquet:{position}") for position, (reason, _, _) in enumerate(rows, start=1) if reason]
    assert sorted(rejects(mixed)) == sorted(found)
    kept = [number for number, (reason, _, _) in enumerate(rows) if not reason]
    clean = {name: column.take(pa.array(kept)) for name, column in columns.items()}
    assert shard_bytes(mixed) == shard_bytes(_run(_write(tmp_path / "clean.parquet", clean), tokenizer))


def test_bad_conversations_are_rejected(tokenizer: Path, tmp_path: Path) -> None:
    talks = [
        TALK,
        TALK[:1],
        [],
        None,
        [{"from": "narrator", "value": "x"}, TALK[1]],
        [{"from": "human", "value": None}, TALK[1]],
        [*TALK, *TALK],
    ]
    images = pa.array([_image(0)] * len(talks), STRUCT)
    out = _run(_write(tmp_path / "in.parquet", {"image": images, "conversations": talks}), tokenizer)
    assert rejects(out) == [
        *(("turns", "in.parquet:2"), ("record", "in.parquet:3"), ("record", "in.parquet:4")),
        *(("record", "in.parquet:5"), ("record", "in.parquet:6"), ("tag_count", "in.parquet:7")),
    ]


def test_damaged_row_group_costs_its_rows_alone(tokenizer: Path, tmp_path: Path) -> None:
    count = 9
    images = pa.array([_image(n, bytes=noise(n, side=20)) for n in range(count)], STRUCT)
    columns = {"image": images, "text": ["x"] * count}
    options = {"row_group_size": 3, "use_dictionary": False, "compression": "none", "write_page_checksum": True}
    path = _write(tmp_path / "in.parquet", columns, **options)
    clean = read_back(_run(path, tokenizer))
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    # Inside the pixels of an image: only the checksum of the page can tell.
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(data)
    out = _run(damaged, tokenizer)
    assert rejects(out) == [("parquet_damaged", f"damaged.parquet:{position}") for position in (4, 5, 6)]
    assert read_back(out) == [sample for sample in clean if sample.position not in (4, 5, 6)]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + data[-8:],
        lambda data: b"PAR1" + bytes(100) + b"PAR1",
        lambda data: b"PAR1" + b"\xff" * 300 + b"\x20\x00\x00\x00PAR1",
        lambda data: b"PAR1",
    ],
)
def test_broken_tables_stop_the_run(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    whole = _write(tmp_path / "whole.parquet", {"text": ["red"] * 50})
    path = tmp_path / "in.parquet"
    path.write_bytes(change(whole.read_bytes()))
    _run(path, tokenizer, code=3)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "in.parquet: not a readable Parquet file (" in error, error


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        (
            "in.parquet",
            "webdataset",
            "--format webdataset: .*in.parquet is a Parquet file, which holds text, ",
        ),
        ("in.jsonl", "parquet", "--format parquet: .*in.jsonl is a JSON file, which holds text, caption"),
        ("in.jsonl", "webdataset", "--format webdataset: .*in.jsonl is a JSON file"),
        ("odd.parquet", "auto", "odd.parquet: format not recognised .it has columns alpha, beta"),
    ],
)
def test_format_of_another_file_kind_is_refused(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, asked: str, message: str
) -> None:
    _write(tmp_path / "in.parquet", {"text": ["red"]})
    _write(tmp_path / "odd.parquet", {"alpha": ["red"], "beta": ["red"]})
    (tmp_path / "in.jsonl").write_text('{"text": "red"}\n')
    _run(tmp_path / name, tokenizer, "--format", asked, code=2)
    assert re.search(message, capsys.readouterr().err)


def test_message_says_how_to_install_pyarrow(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "in.parquet", {"text": ["red"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _run(path, tokenizer, code=2)
    error = capsys.readouterr().err
    assert "in.parquet: reading Parquet needs pyarrow" in error and "pip install 'megavl[parquet]'" in error


def test_other_formats_do_not_load_pyarrow(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "red"}\n')
    code = (
        "import sys; from data_tools.preprocess import main; code = main(sys.argv[1:]); "
        "print('pyarrow' in sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments([path], tokenizer=tokenizer, output=tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
