"""Every image, video and turn of the input is stored, rejected or left out, whatever the records are."""

from __future__ import annotations

import base64
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.pipeline.balance import check_balance
from megavl.config.errors import DataError
from tests.unit.data.corpus_files import make_tokenizer, run_preprocess, write_jsonl
from tests.unit.data_tools.format_files import member, picture, read_back, write_tar

NAMES = ("0.png", "1.png", "gone.png", "../out.png", "http://x/y.png", "data:image/png;base64," + "Zm9v" * 9)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


@st.composite
def _record(draw: st.DrawFn) -> tuple[dict[str, Any], Counter[str]]:
    """A record of any format, and what it holds."""
    names = draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    tags = draw(st.sampled_from([len(names), len(names), 0, 1]))
    rounds = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["caption", "llava", "deepseek", "messages", "parts", "question", "cauldron", "mmc4"]))
    held = Counter({"images": len(names), "videos": 0, "turns": 2 * rounds})
    ask, answer = "<image>" * tags + "What?", "red <image> " * draw(st.sampled_from([1, 1, 60]))
    record: dict[str, Any]
    asked: dict[str, Any]
    if kind == "caption":
        record, held["turns"] = {"image": names, "text": ask}, 0
    elif kind == "llava":
        turns = [{"from": role, "value": "More?"} for _ in range(rounds) for role in ("human", "gpt")]
        turns[0]["value"] = ask
        turns[1]["value"] = answer
        if draw(st.booleans()):
            turns.append({"from": "human", "value": "Unanswered"})
            held["turns"] += 1
        record = {"images": names, "conversations": turns}
    elif kind == "deepseek":
        asked = {"role": "User", "content": ask, "images": names}
        more = [{"role": role, "content": "More."} for _ in range(rounds - 1) for role in ("User", "Assistant")]
        record = {"conversations": [asked, {"role": "Assistant", "content": answer}, *more]}
    elif kind == "messages":
        more = [{"role": role, "content": "More."} for _ in range(rounds - 1) for role in ("user", "assistant")]
        asked = {"role": "user", "content": ask}
        record = {"images": names, "messages": [asked, {"role": "assistant", "content": answer}, *more]}
    elif kind == "parts":
        parts = [{"type": "image", "image": name} for name in names]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
        record, held["turns"] = {"messages": [asked, {"role": "assistant", "content": answer}]}, 2
    elif kind == "question":
        record, held["turns"] = {"images": names, "question": ask, "answer": answer}, 2
    elif kind == "cauldron":
        record = {"images": names, "texts": [{"user": "What?", "assistant": answer}] * rounds}
    else:
        infos = [{"image_name": name, "matched_text_index": 0} for name in names]
        record, held["turns"] = {"text_list": ["One.", answer], "image_info": infos}, 0
    if draw(st.sampled_from([False] * 5 + [True])):
        record["video"] = "clip.mp4"
        held["videos"] = 1
    return record, held


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(_record(), min_size=1, max_size=12), over_long=st.sampled_from(["drop", "cut"]))
def test_records_of_every_format_are_accounted_for(
    root: Path, tokenizer: Path, records: list[tuple[dict[str, Any], Counter[str]]], over_long: str
) -> None:
    good = ({"image": "0.png", "text": "Good."}, Counter({"images": 1}))
    records = [*records, good]
    path, out = write_jsonl(root / "in.jsonl", [record for record, _ in records]), root / "out"
    more = ["--max-bad-frac", "1", "--no-resume", "--over-long", over_long]
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=more) == 0
    balance = json.loads((out / "report.json").read_text())["balance"]
    expected: Counter[str] = sum((held for _, held in records), Counter())
    assert {kind: balance[kind]["found"] for kind in ("images", "videos", "turns")} == {
        kind: expected[kind] for kind in ("images", "videos", "turns")
    }
    for entry in balance.values():
        assert entry["found"] == entry["stored"] + sum(entry["rejected"].values()) + sum(entry["left_out"].values())
    assert balance["images"]["stored"] == sum(len(sample.images) for sample in read_back(out))


def test_members_and_rows_are_accounted_for(root: Path, tokenizer: Path) -> None:
    clip = base64.b64encode(b"x").decode()
    tar = write_tar(
        root / "in.tar",
        [
            *(member("0.png", picture(0)), member("0.txt", b"red")),
            *(member("1.png", picture(1)), member("1.gif", picture(2, kind="GIF")), member("1.txt", b"no tags")),
            *(member("2.v1.jpg", picture(3, kind="JPEG")), member("2.v1.txt", b"a"), member("2.v2.txt", b"b")),
            *(member("3.png", picture(4)), member("3.mp4", b"x"), member("3.txt", b"clip")),
            *(member("4.img10.png", picture(10)), member("4.img9.png", picture(9))),
            member("4.txt", b"<image> after <image>"),
            # A drawing is the origin of the image beside it, but no image itself.
            *(member("5.png", picture(5)), member("5.svg", b"<svg/>"), member("5.txt", b"red")),
            *(member("6.pdf", b"%PDF-"), member("6.json", b'{"text": "page"}')),
        ],
        format=tarfile.USTAR_FORMAT,
    )
    struct = {"bytes": picture(5), "path": None}
    rows = pa.table(
        {
            "image": pa.array([struct, None, struct], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": ["red", "text alone", "blue"],
            "thumbnail": [None, None, struct["bytes"]],
            # Python has no times of this precision.
            "fetched": pa.array([1, 2, 3], pa.timestamp("ns")),
            "clip": [None, None, clip],
        }
    )
    pq.write_table(rows, root / "in.parquet")
    out = root / "out"
    inputs = [tar, root / "in.parquet"]
    assert run_preprocess(inputs, tokenizer=tokenizer, output=out, more=["--max-bad-frac", "1"]) == 0
    balance = json.loads((out / "report.json").read_text())["balance"]
    rejected = {"tag_count": 2, "tar_names": 1, "unsupported_media": 2, "unused_image": 2}
    assert balance["images"] == {"found": 12, "stored": 5, "rejected": rejected, "left_out": {}}
    assert balance["videos"] == {"found": 1, "stored": 0, "rejected": {"unsupported_media": 1}, "left_out": {}}
    files = [image for sample in read_back(out) for image in sample.images]
    # Members that differ by a number are in the order of the number.
    assert files == [picture(0), picture(9), picture(10), picture(5), picture(5)]


def test_a_balance_that_does_not_close_is_an_error() -> None:
    kept = {"found": 3, "stored": 1, "rejected": {"image_missing": 1}, "left_out": {"over_long": 1}}
    check_balance({"images": kept})
    with pytest.raises(DataError, match="the input holds 4 images, but 3 are stored, rejected or left out"):
        check_balance({"images": {**kept, "found": 4}})


def test_lines_of_different_formats_share_a_file(root: Path, tokenizer: Path) -> None:
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    records = [{"text": "Plain."}, {"image": "0.png", "text": "Red."}, {"image": "1.png", "conversations": talk}]
    forward, backward = root / "forward", root / "backward"
    for name, order in (("forward", records), ("backward", records[::-1])):
        path = write_jsonl(root / f"{name}.jsonl", order)
        assert run_preprocess([path], tokenizer=tokenizer, output=root / name) == 0
    samples = [sorted((s.ids, s.supervised, s.images) for s in read_back(out)) for out in (forward, backward)]
    assert samples[0] == samples[1] and len(samples[0]) == 3
    assert json.loads((forward / "manifest.json").read_text())["templates"] == ["deepseek", "plain"]


def test_rows_whose_image_is_null_are_counted(root: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": picture(1), "path": None}, None, None], struct)
    table = pa.table({"image": images, "question": ["Q"] * 3, "answer": ["red", "green", None]})
    pq.write_table(table, root / "in.parquet")
    inputs, more = [root / "in.parquet"], ["--max-bad-frac", "1"]
    assert run_preprocess(inputs, tokenizer=tokenizer, output=root / "out", more=more) == 0
    assert "1 records whose image is null or empty are stored as text" in capsys.readouterr().out
    report = json.loads((root / "out/report.json").read_text())
    assert (report["records_with_empty_image"], report["samples"], report["images"]) == (1, 2, 1)


def test_columns_hold_for_some_of_the_inputs(root: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"by": "client", "said": "Q"}, {"by": "helper", "said": "A"}]
    paths = [
        write_jsonl(root / "0.jsonl", [{"text": "red"}]),
        write_jsonl(root / "1.jsonl", [{"photo": "0.png", "text": "red"}, {"talk": turns}]),
    ]
    names = ["conversations=talk", "role=by", "content=said", "user=client", "assistant=helper"]
    more = ["--columns", "image=photo", *names]
    assert run_preprocess(paths, tokenizer=tokenizer, output=root / "out", more=more) == 0
    assert json.loads((root / "out/report.json").read_text())["balance"]["turns"]["stored"] == 2
    for wrong, message in (("user=guest", "no 'guest' in the first records"), ("image=alt", "names image twice")):
        more = ["--columns", "image=photo", *names[:3], wrong]
        assert run_preprocess(paths, tokenizer=tokenizer, output=root / "out2", more=more) == 2
        assert message in capsys.readouterr().err


def test_a_column_that_does_not_exist_is_refused(
    root: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(root / "in.jsonl", [{"photo": "0.png", "alt": "red"}])
    more = ["--columns", "image=picture", "text=alt"]
    assert run_preprocess([path], tokenizer=tokenizer, output=root / "out", more=more) == 2
    error = capsys.readouterr().err
    assert "--columns image=picture: no 'picture' in the first records of" in error and "they have alt, photo" in error
    more = ["--columns", "image=photo", "text=alt"]
    assert run_preprocess([path], tokenizer=tokenizer, output=root / "out", more=more) == 0
    assert [sample.images for sample in read_back(root / "out")] == [[picture(0)]]
