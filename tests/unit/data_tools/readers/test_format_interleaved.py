"""OBELICS and MMC4: text interleaved with images, some of which have no file."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.pipeline.image_map import ImageMap
from megavl.config.errors import DataError, UsageError
from tests.unit.data.corpus_files import IMAGE_TOKENS, SEQ_LENGTH, run_preprocess, write_jsonl
from tests.unit.data_tools.format_files import IMAGE_ID, Expected, picture, read_back, rejects, shard_bytes

SITE = "https://example.org"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(picture(number))
    lines = [f"{SITE}/{number}\timages/{number}.png\n" for number in range(4)]
    (tmp_path / "map.tsv").write_text("".join([*lines, f"{SITE}/lost\timages/lost.png\n", f"{SITE}/0\tother.png\n"]))
    return tmp_path


def _run(root: Path, tokenizer: Path, records: list[Any], *, name: str = "in", more: tuple[str, ...] = ()) -> Path:
    path = write_jsonl(root / f"{name}.jsonl", records)
    out = root / f"out-{name}"
    mapped = () if "text_list" in records[0] else ("--image-map", str(root / "map.tsv"))
    more = ("--max-bad-frac", "0.9", *mapped, *more)
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=more) == 0
    return out


def _obelics(*parts: str) -> dict[str, Any]:
    """A document whose parts are texts and image addresses."""
    is_image = [part.startswith("http") for part in parts]
    return {
        "images": [part if image else None for part, image in zip(parts, is_image)],
        "texts": [None if image else part for part, image in zip(parts, is_image)],
        "metadata": "[]",
        "general_metadata": "{}",
    }


def _mmc4(sentences: list[str], *images: tuple[str | None, int]) -> dict[str, Any]:
    infos = [{"image_name": name, "matched_text_index": index, "matched_sim": 0.25} for name, index in images]
    return {"text_list": sentences, "image_info": infos, "url": SITE, "similarity_matrix": [[0.25]]}


def test_obelics_documents_give_exact_samples(root: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        _obelics("First.", f"{SITE}/0", "Second <image>.", f"{SITE}/1"),
        _obelics(f"{SITE}/2", f"{SITE}/gone", "", "Only.", f"{SITE}/lost", "More."),
        _obelics(f"{SITE}/gone", "Text alone."),
    ]
    out = _run(root, tokenizer, records)
    printed = capsys.readouterr().out
    assert "format obelics (recognised), template plain" in printed
    assert "images: 6 found = 3 stored + 3 left out (without_file 3)" in printed
    expect = Expected(tokenizer).document
    assert {sample.position: sample for sample in read_back(out)} == {
        1: _spelled(expect("First.", picture(0), "\n\nSecond @.", picture(1), position=1), tokenizer),
        2: expect(picture(2), "Only.\n\nMore.", position=2),
        3: expect("Text alone.", position=3),
    }
    entry = json.loads((out / "report.json").read_text())["inputs"][0]
    assert (entry["records"], entry["images"], entry["images_without_file"]) == (3, 3, 3)


def _spelled(sample: Any, tokenizer: Path) -> Any:
    """The sample with `<image>`, which is ordinary text here, instead of `@`."""
    expect = Expected(tokenizer).document
    return expect("First.", sample.images[0], "\n\nSecond <image>.", sample.images[1], position=sample.position)


def test_mmc4_documents_give_exact_samples(root: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        _mmc4(["One.", "Two.", "Three."], ("images/0.png", 2), ("images/1.png", 0)),
        _mmc4(["One.", "Two."], ("images/2.png", 1), ("images/3.png", 1), ("images/lost.png", 0), (None, 1)),
    ]
    out = _run(root, tokenizer, records)
    assert "format mmc4 (recognised), template plain" in capsys.readouterr().out
    expect = Expected(tokenizer).document
    assert read_back(out) == [
        expect(picture(1), "One. Two.", picture(0), " Three.", position=1),
        expect("One.", picture(2), picture(3), " Two.", position=2),
    ]
    assert json.loads((out / "report.json").read_text())["images_without_file"] == 2


def test_documents_as_they_are_published(root: Path, tokenizer: Path) -> None:
    """Indices that are null on both sides, and numbers that were written as floats."""
    both_null = {"images": [f"{SITE}/0", None, None], "texts": [None, None, "One."], "metadata": "[{}]"}
    expect = Expected(tokenizer).document
    assert read_back(_run(root, tokenizer, [both_null], name="o")) == [expect(picture(0), "One.", position=1)]
    info = {"image_name": "images/1.png", "raw_url": f"{SITE}/1.png", "matched_text_index": 1.0, "matched_sim": 0.3}
    mmc4 = {**_mmc4(["One.", "Two."]), "image_info": [{**info, "face_detections": None}]}
    assert read_back(_run(root, tokenizer, [mmc4], name="m")) == [expect("One.", picture(1), " Two.", position=1)]


def test_obelics_with_local_images_needs_no_map(root: Path, tokenizer: Path) -> None:
    path = write_jsonl(
        root / "in.jsonl", [_obelics("One."), {"images": ["images/1.png", None], "texts": [None, "Two."]}]
    )
    assert run_preprocess([path], tokenizer=tokenizer, output=root / "out") == 0
    expect = Expected(tokenizer).document
    assert {s.position: s for s in read_back(root / "out")} == {
        1: expect("One.", position=1),
        2: expect(picture(1), "Two.", position=2),
    }


def test_long_documents_are_divided_between_images(root: Path, tokenizer: Path) -> None:
    names = [f"images/{number % 4}.png" for number in range(7)]
    sentences = [f"{'red ' * (30 * (0 < number < 6))}end." for number in range(7)]
    record = _mmc4(sentences, *((name, number) for number, name in enumerate(names)))
    out = _run(root, tokenizer, [record])
    samples = read_back(out)
    whole = Expected(tokenizer).document(
        *(part for n, text in enumerate(sentences) for part in (picture(n % 4), f" {text}" if n else text)), position=1
    )
    assert [token for sample in samples for token in sample.ids] == whole.ids
    assert [flag for sample in samples for flag in sample.supervised] == whole.supervised
    assert [image for sample in samples for image in sample.images] == whole.images
    assert len(samples) > 3
    for sample in samples:
        assert sample.ids.count(IMAGE_ID) == IMAGE_TOKENS * len(sample.images)
        assert len(sample.ids) <= SEQ_LENGTH and len(sample.images) <= 2
    assert json.loads((out / "report.json").read_text())["documents_cut"] == 1


def test_bad_documents_leave_the_others_unchanged(root: Path, tokenizer: Path) -> None:
    (root / "images/cut.png").write_bytes(picture(1, size=(90, 90))[:-30])
    good = [_mmc4(["One."], ("images/0.png", 0)), _mmc4(["Two."], ("images/1.png", 0))]
    bad: list[tuple[str, Any]] = [
        ("record", _mmc4(["One."], ("images/0.png", 1))),
        ("record", _mmc4(["One."], ("images/0.png", -1))),
        ("record", {"text_list": ["One."], "image_info": [{"image_name": "images/0.png"}]}),
        ("record", {"text_list": ["One."], "image_info": [{"image_name": 3, "matched_text_index": 0}]}),
        ("record", {"text_list": ["One."], "image_info": ["images/0.png"]}),
        ("record", {"text_list": "One.", "image_info": []}),
        ("record", {"text_list": [1], "image_info": []}),
        ("empty_text", _mmc4([" "], ("images/0.png", 0))),
        ("image_truncated", _mmc4(["One."], ("images/cut.png", 0))),
        ("image_outside_root", _mmc4(["One."], ("../../etc/passwd", 0))),
        ("image_outside_root", _mmc4(["One."], ("/etc/passwd", 0))),
    ]
    clean = _run(root, tokenizer, good, name="clean")
    mixed = _run(root, tokenizer, [good[0], *(record for _, record in bad), good[1]])
    found = [(reason, f"in.jsonl:{position}") for position, (reason, _) in enumerate(bad, start=2)]
    assert sorted(rejects(mixed)) == sorted(found)
    assert shard_bytes(mixed) == shard_bytes(clean)


def test_bad_obelics_documents_are_rejected(root: Path, tokenizer: Path) -> None:
    good = _obelics("One.", f"{SITE}/1")
    bad = [
        {**good, "texts": ["One."]},
        {**good, "texts": ["One.", "Two."]},
        {**good, "texts": [None, None]},
        {**good, "images": [3, None], "texts": [None, "One."]},
        {**good, "images": "x"},
    ]
    mixed = _run(root, tokenizer, [good, *bad], more=("--format", "obelics"))
    reasons = ["record", "record", "empty_text", "record", "record"]
    assert rejects(mixed) == [(reason, f"in.jsonl:{position}") for position, reason in enumerate(reasons, start=2)]
    assert shard_bytes(mixed) == shard_bytes(_run(root, tokenizer, [good], name="clean"))


@pytest.mark.parametrize(
    ("record", "mapped", "code", "message"),
    [
        (_obelics("One.", f"{SITE}/1"), None, 2, "--image-map: format obelics names images by address"),
        (_obelics("One.", f"{SITE}/9"), "map.tsv", 3, "in.jsonl: none of its 1 images has a file"),
        (_mmc4(["One."], ("typo/0.png", 0)), None, 3, "in.jsonl: none of its 1 images has a file"),
        (_obelics("One.", f"{SITE}/1"), "gone.tsv", 2, "--image-map "),
    ],
)
def test_run_stops_when_all_images_are_missing(
    root: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    record: dict[str, Any],
    mapped: str | None,
    code: int,
    message: str,
) -> None:
    path = write_jsonl(root / "in.jsonl", [record])
    more = [] if mapped is None else ["--image-map", str(root / mapped)]
    assert run_preprocess([path], tokenizer=tokenizer, output=root / "out", more=more) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (root / "out" / "manifest.json").exists()


def test_addresses_in_other_formats_use_the_map(root: Path, tokenizer: Path) -> None:
    records = [{"image": f"{SITE}/{name}", "text": "A thing."} for name in ("1", "gone", "lost")]
    out = _run(root, tokenizer, records)
    assert rejects(out) == [("image_address", "in.jsonl:2"), ("image_missing", "in.jsonl:3")]
    assert read_back(out) == [Expected(tokenizer).document(picture(1), "A thing.", position=1)]


def test_map_finds_the_first_line_of_an_address(tmp_path: Path) -> None:
    path = tmp_path / "map.tsv"
    path.write_text("".join(f"{SITE}/{n}\tf/{n}.jpg\r\n" for n in range(1000)) + f"{SITE}/7\tsecond.jpg\n")
    found = ImageMap(str(path))
    assert len(found) == 1001
    assert [found.find(f"{SITE}/{n}") for n in (0, 7, 999, 1000)] == ["f/0.jpg", "f/7.jpg", "f/999.jpg", None]


@pytest.mark.parametrize("line", [b"no tab", b"\tfile", b"http://x\t", b"http://x\t \n", b"http://x\t\xff", b""])
def test_map_with_a_bad_line_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "map.tsv"
    path.write_bytes(b"http://y\ta.png\n" + line + b"\n")
    with pytest.raises(DataError, match=r"map\.tsv:2: must be an address, a tab and a path"):
        ImageMap(str(path))
    with pytest.raises(UsageError, match="cannot read"):
        ImageMap(str(tmp_path))
