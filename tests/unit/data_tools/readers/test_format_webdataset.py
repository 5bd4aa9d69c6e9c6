"""WebDataset tars: exact samples, and rejects for hostile archives."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.readers.tar_archive import Member, members
from tests.unit.data.corpus_files import run_preprocess
from tests.unit.data_tools.format_files import (
    IMAGE,
    Expected,
    member,
    picture,
    read_back,
    rejects,
    shard_bytes,
    write_tar,
)

Members = list[tuple[tarfile.TarInfo, bytes]]


def _run(path: Path, tokenizer: Path, *more: str, code: int = 0) -> Path:
    out = path.with_suffix("")
    more = ("--max-bad-frac", "0.95", *more)
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=more) == code
    return out


def _caption(key: str, number: int) -> Members:
    return [member(f"{key}.png", picture(number)), member(f"{key}.txt", f"Thing {number}.".encode())]


def _json(key: str, content: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(f"{key}.json", json.dumps(content).encode())


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_records_of_every_kind_are_read(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: int
) -> None:
    question = {"from": "human", "value": "<image>Which?"}
    members = [
        member("README", b"no key"),
        member("part", type=tarfile.DIRTYPE),
        *_caption("part/000", 1),
        member("001.JPEG", picture(2, kind="JPEG")),
        member("001.txt", b"Where <image> is.\n"),
        member("001.json", b"not even JSON: metadata is not read"),
        member("001.cls", b"7"),
        member("002.webp", picture(3, kind="WEBP")),
        _json("002", {"id": 1, "conversations": [question, {"from": "gpt", "value": "red"}]}),
        _json("003", [{"role": "User", "content": "<image_placeholder>?"}, {"role": "Assistant", "content": "No."}]),
        member("003.jpg", picture(4, kind="JPEG")),
        _json("004", {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}]},
                                   {"role": "assistant", "content": "B"}]}),
        member("004.png", picture(5)),
        member("004.jpg", b""),
        _json("005", {"text": "Words."}),
        member("005.png", picture(6)),
        _json("006", {"text": "Words alone, <image> too."}),
        _json("007", {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]}),
        member("._008.png", b"left by a copy"),
        member("008.png", picture(7)),
        _json("008", {"conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "C"}]}),
        member("008.jpg", picture(8, kind="JPEG")),
    ]  # fmt: skip
    out = _run(write_tar(tmp_path / "in.tar", members, format=format), tokenizer)
    assert "format webdataset (recognised), template deepseek" in capsys.readouterr().out
    expect = Expected(tokenizer)
    assert {sample.position: sample for sample in read_back(out)} == {
        3: expect.document(picture(1), "Thing 1.", position=3),
        5: expect.document(picture(2, kind="JPEG"), "Where <image> is.", position=5),
        9: expect.conversation((f"{IMAGE}Which?", "red"), position=9, images=[picture(3, kind="WEBP")]),
        11: expect.conversation((f"{IMAGE}?", "No."), position=11, images=[picture(4, kind="JPEG")]),
        16: expect.document(picture(6), "Words.", position=16),
        18: expect.document("Words alone, <image> too.", position=18),
        19: expect.conversation(("Hm?", "Yes."), position=19),
        21: expect.conversation((f"{IMAGE}{IMAGE}?", "C"), position=21, images=[picture(7), picture(8, kind="JPEG")]),
    }
    # An empty file is an image member too.
    assert rejects(out) == [("tag_count", "in.tar:13")]


def test_images_of_every_format_are_members(tokenizer: Path, tmp_path: Path) -> None:
    kinds = {"JPEG": ("jpg", "JPEG", "jpe", "jfif"), "MPO": ("mpo",), "PNG": ("png", "apng"), "WEBP": ("webp",)}
    kinds |= {"GIF": ("gif",), "BMP": ("bmp", "BMP"), "TIFF": ("tif", "TIFF")}
    images = [(suffix, picture(9, kind=kind)) for kind, suffixes in kinds.items() for suffix in suffixes]
    members = [
        part
        for number, (suffix, data) in enumerate(images)
        for part in (member(f"{number}.{suffix}", data), member(f"{number}.txt", b"A thing."))
    ]
    out = _run(write_tar(tmp_path / "in.tar", members), tokenizer)
    assert not rejects(out)
    assert [sample.images for sample in read_back(out)] == [[data] for _, data in images]


def test_long_and_foreign_names_are_read(tokenizer: Path, tmp_path: Path) -> None:
    names = ["a" * 90 + "/" + "b" * 60, "ä" * 140, "x" * 200, "./y y"]
    members = [part for number, name in enumerate(names) for part in _caption(name, number)]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = _run(write_tar(tmp_path / f"{format}.tar", members, format=format), tokenizer)
        expect = Expected(tokenizer)
        assert read_back(out) == [
            expect.document(picture(n), f"Thing {n}.", position=1 + 2 * n) for n in range(len(names))
        ]


def test_same_image_in_two_records_is_stored_once(tokenizer: Path, tmp_path: Path) -> None:
    members = [part for key in ("0", "1") for part in _caption(key, 5)]
    out = _run(write_tar(tmp_path / "in.tar", members), tokenizer)
    assert json.loads((out / "multimodal-00000.json").read_text())["images"] == 1
    assert [sample.images for sample in read_back(out)] == [[picture(5)]] * 2


def test_bad_members_leave_the_others_unchanged(tokenizer: Path, tmp_path: Path) -> None:
    link: dict[str, Any] = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    hard: dict[str, Any] = {"type": tarfile.LNKTYPE, "linkname": "good/0.png"}
    talk = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]}
    bad: list[tuple[str, Members]] = [
        ("tar_path", _caption("../../etc/cron", 2)),
        ("tar_path", _caption("/etc/cron", 2)),
        ("tar_path", _caption("a/../../b", 2)),
        ("tar_link", [member("link.png", **link), member("link.txt", b"x")]),
        ("tar_link", [member("hard.png", **hard), member("hard.txt", b"x")]),
        ("tar_link", [member("bare", **link)]),
        ("tar_special", [member("dev.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), member("dev.txt", b"x")]),
        ("tar_special", [member("fifo.png", type=tarfile.FIFOTYPE), member("fifo.txt", b"x")]),
        ("tar_special", [member("sparse.png", picture(2), type=tarfile.GNUTYPE_SPARSE), member("sparse.txt", b"x")]),
        ("tar_special", [member("odd.png", picture(2), type=b"Z"), member("odd.txt", b"x")]),
        ("tar_incomplete", [member("image.png", picture(2))]),
        ("tar_incomplete", [member("text.txt", b"alone")]),
        ("tar_unsorted", [*_caption("twice", 2), *_caption("twice", 3)]),
        ("tar_unsorted", _caption("apart", 2)),
        ("record_too_long", [member("long.png", picture(2)), member("long.txt", b"x" * 1001)]),
        ("image_too_large", [member("big.png", b"x" * 3001), member("big.txt", b"x")]),
        ("encoding", [member("utf.png", picture(2)), member("utf.txt", b"\xff\xfe")]),
        ("encoding", [member("utf-json.png", picture(2)), member("utf-json.json", b'{"text": "\xff"}')]),
        ("json", [member("json.png", picture(2)), member("json.json", b'{"text": ')]),
        ("json", [member("deep.png", picture(2)), member("deep.json", b"[" * 990)]),
        ("record", [member("keys.png", picture(2)), _json("keys", {"note": "made by a download"})]),
        ("unused_image", [member("both.png", picture(2)), _json("both", {**talk, "images": ["both.png", "a"]})]),
        ("image_outside_root", [_json("path", {**talk, "image": "../../secret.png"})]),
        ("tag_count", [member("tags.png", picture(2)), _json("tags", {**talk, "conversations": [
            {"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "red"}]})]),
        ("tag_count", [member("two.png", picture(2)), member("two.jpg", picture(2, kind="JPEG")),
                       member("two.txt", b"x")]),
        ("empty_text", [member("empty.png", picture(2)), member("empty.txt", b" \n")]),
        ("image_empty", [member("zero.png", b""), member("zero.txt", b"x")]),
        ("image_truncated", [member("cut.png", picture(2, size=(90, 90))[:-20]), member("cut.txt", b"x")]),
        ("image_format", [member("svg.png", b"<svg/>"), member("svg.txt", b"x")]),
        ("image_format", [member("eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"), member("eps.txt", b"x")]),
        ("image_aspect", [member("thin.png", picture(2, size=(1, 200_000))), member("thin.txt", b"x")]),
        ("tar_unsorted", _caption("apart", 3)),
    ]  # fmt: skip
    good = [_caption("good/0", 0), _caption("good/1", 1)]
    members = [*good[0], *(part for _, parts in bad for part in parts), *good[1]]
    expected, number = [], 3
    for reason, parts in bad:
        expected.append((reason, f"mixed.tar:{number}"))
        number += len(parts)
    limits = pytest.MonkeyPatch()
    with limits.context() as patch:
        patch.setattr("data_tools.readers.tar_archive.MAX_RECORD", 1000)
        patch.setattr("data_tools.readers.tar_archive.MAX_IMAGE", 3000)
        mixed = _run(write_tar(tmp_path / "mixed.tar", members, format=tarfile.GNU_FORMAT), tokenizer)
    clean = _run(write_tar(tmp_path / "clean.tar", [*good[0], *good[1]]), tokenizer)
    assert sorted(rejects(mixed)) == sorted(expected)
    assert shard_bytes(mixed) == shard_bytes(clean)
    assert not (tmp_path / "etc").exists() and sorted(file.name for file in tmp_path.iterdir()) == [
        *("clean", "clean.tar", "mixed", "mixed.tar"),
    ]


def test_a_bomb_is_rejected_from_its_header(tokenizer: Path, tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(out, "PNG")
    bomb = out.getvalue()
    members = [*_caption("0", 0), member("1.png", bomb), member("1.txt", b"x"), *_caption("2", 2)]
    made = _run(write_tar(tmp_path / "in.tar", members), tokenizer)
    assert rejects(made) == [("image_too_large", "in.tar:3")]
    assert len(read_back(made)) == 2


@pytest.mark.parametrize(
    ("keep", "found", "samples"),
    [
        # Every member takes a block of header and one of content, so every key four blocks.
        ((12, 0), [], 3),
        ((11, 8), [], 3),  # all of the content, without its padding
        ((11, 1), ["tar_truncated 5"], 2),
        ((10, 300), ["tar_incomplete 5", "tar_truncated 6"], 2),
        ((10, 0), ["tar_incomplete 5"], 2),
        ((9, 20), ["tar_truncated 5"], 2),
        ((8, 300), ["tar_truncated 5"], 2),
        ((8, 0), [], 2),
        ((3, 0), ["tar_truncated 1"], 0),
    ],
)
def test_truncated_archives_lose_only_their_end(
    tokenizer: Path, tmp_path: Path, keep: tuple[int, int], found: list[str], samples: int
) -> None:
    whole = write_tar(tmp_path / "whole.tar", [part for n in range(3) for part in _caption(str(n), n)])
    path = tmp_path / "in.tar"
    path.write_bytes(whole.read_bytes()[: keep[0] * 512 + keep[1]])
    out = _run(path, tokenizer, code=0 if samples else 3)
    assert rejects(out) == [(line.split()[0], f"in.tar:{line.split()[1]}") for line in found]
    assert not samples or len(read_back(out)) == samples


def _header(data: bytes, *, at: int, field: int, value: bytes) -> bytes:
    """The archive with other bytes in one header and a matching checksum."""
    header = bytearray(data[at : at + 512])
    header[field : field + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


_SIZE, _FLAG = 124, 156


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: _header(data, at=4 * 512, field=_SIZE, value=b"77777777777\0"), "tar_truncated"),
        (lambda data: _header(data, at=4 * 512, field=_SIZE, value=b"\x80" + b"\xff" * 11), "tar_truncated"),
        (lambda data: _header(data, at=4 * 512, field=_SIZE, value=b"\xff" * 12), "tar_damaged"),
        (lambda data: _header(data, at=4 * 512, field=_SIZE, value=b"-0000000512\0"), "tar_damaged"),
        (lambda data: _header(data, at=4 * 512, field=_SIZE, value=b"1_000\0"), "tar_damaged"),
        (lambda data: data[: 4 * 512] + b"\xff" + data[4 * 512 + 1 :], "tar_damaged"),
        (lambda data: data[: 4 * 512] + b"not a tar" * 200, "tar_damaged"),
        (lambda data: _header(data, at=4 * 512, field=_FLAG, value=b"x"), "tar_damaged"),
        (
            lambda data: _header(
                _header(data, at=4 * 512, field=_FLAG, value=b"L"), at=4 * 512, field=_SIZE, value=b"00017777777\0"
            ),
            "tar_damaged",
        ),
    ],
)
def test_hostile_headers_end_the_archive(tokenizer: Path, tmp_path: Path, change: Any, reason: str) -> None:
    whole = write_tar(tmp_path / "whole.tar", [part for n in range(3) for part in _caption(str(n), n)])
    path = tmp_path / "in.tar"
    path.write_bytes(change(whole.read_bytes()))
    out = _run(path, tokenizer)
    assert rejects(out) == [(reason, "in.tar:3")]
    assert [sample.position for sample in read_back(out)] == [1]


def test_endless_chain_of_long_names_is_rejected(tokenizer: Path, tmp_path: Path) -> None:
    start = write_tar(tmp_path / "whole.tar", _caption("0", 0)).read_bytes()[: 4 * 512]
    chain = _header(start, at=0, field=_FLAG, value=b"L")[: 2 * 512] * 5000
    path = tmp_path / "in.tar"
    path.write_bytes(start + chain)
    out = _run(path, tokenizer)
    assert rejects(out) == [("tar_truncated", "in.tar:3")] and len(read_back(out)) == 1


def test_sparse_pax_file_is_rejected(tokenizer: Path, tmp_path: Path) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"}
    members = [*_caption("0", 0), *_caption("1", 1)]
    members[2][0].pax_headers = headers
    out = _run(write_tar(tmp_path / "in.tar", members, format=tarfile.PAX_FORMAT), tokenizer)
    assert rejects(out) == [("tar_special", "in.tar:3")]


def test_scattered_keys_stop_the_run(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [_caption(str(number), number) for number in range(5)]
    path = write_tar(tmp_path / "in.tar", [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)])
    out = _run(path, tokenizer, code=3)
    assert "10 of 10 records rejected (tar_unsorted 10), above --max-bad-frac" in capsys.readouterr().err
    assert "tar --sort=name" in (out / "rejects.jsonl").read_text()


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, lambda data: b"PK\x03\x04" + data])
def test_compressed_archives_are_refused(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "in.tar.gz"
    path.write_bytes(compress(write_tar(tmp_path / "whole.tar", _caption("0", 0)).read_bytes()))
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 3
    assert "in.tar.gz: is compressed (" in capsys.readouterr().err


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300),
            st.integers(0, 1500),
            st.booleans(),
            # A file whose name ends so is a directory to tar and to us, and none to the standard library.
        ).filter(lambda file: file[2] or not file[0].endswith("/")),
        max_size=8,
    ),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@example(files=[("/0", 0, False), ("/", 0, True)], format=tarfile.GNU_FORMAT)
def test_members_equal_those_of_tarfile(tmp_path: Path, files: list[tuple[str, int, bool]], format: int) -> None:
    entries = [
        member(name, b"" if folder else b"x" * size, **({"type": tarfile.DIRTYPE} if folder else {}))
        for name, size, folder in files
    ]
    path = write_tar(tmp_path / "in.tar", entries, format=format)
    with open(path, "rb") as stream, tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size, info.isdir()) for info in archive]
        end = path.stat().st_size
        found = list(members(stream.fileno(), start=0, end=end))
        assert [(m.name.decode().rstrip("/"), m.start, m.size, m.directory) for m in found] == expected
        for one in found:
            # Reading can start at any header.
            again = list(members(stream.fileno(), start=one.begin, end=end, number=one.number))
            assert list(map(_comparable, again)) == list(map(_comparable, found[one.number - 1 :]))


def _comparable(one: Member) -> tuple[Member, str]:
    """Compares errors by their text, because two errors are never equal."""
    return one._replace(problem=None), str(one.problem)


def test_joined_archives_are_read_to_the_end(tokenizer: Path, tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{n}.tar", _caption(str(n), n)).read_bytes() for n in range(3)]
    (tmp_path / "in.tar").write_bytes(b"".join(parts) + bytes(3 << 20) + b"\0" * 100)
    out = _run(tmp_path / "in.tar", tokenizer)
    assert [sample.position for sample in read_back(out)] == [1, 3, 5] and rejects(out) == []


def test_equal_checksums_do_not_make_images_equal(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.pipeline.shard_writer.zlib.crc32", lambda data: 7)
    files = [picture(5, kind="JPEG") + bytes([n]) for n in (1, 2, 1)]
    members = [
        part for n, data in enumerate(files) for part in (member(f"{n}.jpg", data), member(f"{n}.txt", b"A thing."))
    ]
    out = _run(write_tar(tmp_path / "in.tar", members), tokenizer)
    assert [sample.images for sample in read_back(out)] == [[data] for data in files]
