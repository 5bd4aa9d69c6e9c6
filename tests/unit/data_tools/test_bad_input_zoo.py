"""Every kind of bad input in one run: each record is rejected with its reason, and the others are unaffected."""

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.pipeline import task
from megavl.data.tokenizer import HuggingFaceTokenizer
from tests.unit.data.corpus_files import make_images, make_tokenizer, run_preprocess

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
TALK = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _zoo(root: Path) -> dict[str, str]:
    """Bad images, with the reason of each reject."""
    folder = root / "images"
    noise = Image.effect_noise((300, 300), 50)
    saved = {kind: io.BytesIO() for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")}
    for kind, out in saved.items():
        noise.save(out, kind)
        (folder / f"cut.{kind.lower()}").write_bytes(out.getvalue()[: len(out.getvalue()) * 2 // 3])
    (folder / "two_bytes_less.jpg").write_bytes(saved["JPEG"].getvalue()[:-2])
    files = {"page.jpg": b"<html></html>", "drawing.svg": SVG, "svg.png": SVG, "drawing.eps": EPS, "eps.jpg": EPS}
    for name, data in {**files, "empty.png": b"", "bytes.png": bytes(range(256)) * 9}.items():
        (folder / name).write_bytes(data)
    Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    Image.new("1", (14_000, 14_000)).save(folder / "larger_bomb.png")
    Image.new("1", (1, 200_000)).save(folder / "narrow.png")
    noise.save(root.parent / "secret.png")
    return {
        **{f"images/cut.{kind.lower()}": "image_truncated" for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")},
        "images/two_bytes_less.jpg": "image_truncated",
        **{f"images/{name}": "image_format" for name in (*files, "bytes.png")},
        "images/empty.png": "image_empty",
        "images/bomb.png": "image_too_large",
        "images/larger_bomb.png": "image_too_large",
        "images/narrow.png": "image_aspect",
        "images/gone.png": "image_missing",
        "../secret.png": "image_outside_root",
        "images/../../secret.png": "image_outside_root",
        str(root.parent / "secret.png"): "image_outside_root",
        "data:image/svg+xml;base64," + base64.b64encode(SVG).decode(): "image_format",
    }


def _lines(root: Path) -> list[tuple[bytes, str | None]]:
    """Lines of a JSONL file of conversations, with the reason of each reject."""
    good: Any = lambda n: {"image": f"images/{n}.png", "conversations": TALK, "id": n}  # noqa: E731
    rows: list[tuple[Any, str | None]] = [({**good(1), "image": name}, why) for name, why in _zoo(root).items()]
    rows += [
        ({"images": ["images/1.png"] * 2, "conversations": TALK}, "tag_count"),
        ({"conversations": TALK}, "tag_count"),
        ({"image": "images/1.png", "conversations": [TALK[0], {"from": "gpt", "value": " "}]}, "turns"),
        ({"image": "images/1.png", "conversations": [TALK[0], {"from": "gpt", "value": "red " * 999}]}, "too_long"),
        ({**good(1), "note": "x" * (1 << 20)}, "record_too_long"),
        ({**good(1), "conversations": [TALK[0], {"from": "gpt", "value": "\ud800"}]}, "encoding"),
        (b'{"image": "images/1.png", "conversations": [', "json"),
        (b'{"image": "images/1.png", "id": "\xff\xfe"}', "encoding"),
        (b"\x00\x01\x02", "json"),
        ([1, 2, 3], "record"),
        ({"image": "images/1.png"}, "record"),
    ]
    shutil.copy(root / "images/1.png", root / "images/png_called.jpg")
    fine = [*(good(n) for n in range(1, 30) if n % 3), {**good(1), "image": "images/png_called.jpg"}]
    # Good records follow bad ones, so that a side effect of a bad one shows.
    mixed: list[tuple[Any, str | None]] = []
    for number, row in enumerate(rows):
        mixed += [row, (fine[number % len(fine)], None)]
    mixed += [(row, None) for row in fine]
    return [(row if isinstance(row, bytes) else json.dumps(row).encode(), why) for row, why in mixed]


def test_bad_records_leave_the_others_unchanged(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The true limit is 64 MB: the same code with a smaller file.
    monkeypatch.setattr("data_tools.readers.json_file.MAX_RECORD", 1 << 20)
    root = tmp_path / "in"
    make_images(root / "images", count=30)
    lines = _lines(root)
    (root / "mixed.jsonl").write_bytes(b"\n".join(line for line, _ in lines) + b"\n")
    (root / "clean.jsonl").write_bytes(b"\n".join(line for line, why in lines if why is None) + b"\n")
    for name in ("mixed", "clean"):
        # One split each, so that shards can be compared; bombs are rejected from their headers.
        monkeypatch.setattr(
            "data_tools.pipeline.job._SPLIT_BYTES", dict.fromkeys(("text", "paths", "images"), (1 << 30, 1 << 30))
        )
        more = ["--max-bad-frac", "0.6", "--format", "llava"]
        assert run_preprocess([root / f"{name}.jsonl"], tokenizer=tokenizer, output=tmp_path / name, more=more) == 0
    assert "Traceback" not in capsys.readouterr().err
    for part in ("tokens.bin", "tokens.idx", "images.bin", "images.idx", "images.npy", "spans.npy"):
        mixed, clean = ((tmp_path / name / f"multimodal-00000.{part}").read_bytes() for name in ("mixed", "clean"))
        assert mixed == clean, part
    tables = [np.load(tmp_path / name / "multimodal-00000.samples.npy") for name in ("mixed", "clean")]
    kept = [number for number, (_, why) in enumerate(lines, start=1) if why is None]
    assert tables[0]["place"].tolist() == kept and tables[1]["place"].tolist() == [*range(1, len(kept) + 1)]
    for column in tables[0].dtype.names:
        assert column == "place" or np.array_equal(tables[0][column], tables[1][column]), column
    assert (tmp_path / "mixed/packs.npy").read_bytes() == (tmp_path / "clean/packs.npy").read_bytes()
    rejects = [json.loads(line) for line in (tmp_path / "mixed/rejects.jsonl").read_text().splitlines()]
    found = {(reject["record"], reject["reason"]) for reject in rejects}
    path = root / "mixed.jsonl"
    expected = {(f"{path}:{number}", why) for number, (_, why) in enumerate(lines, start=1) if why}
    assert found == expected and len(rejects) == len(expected)
    report = json.loads((tmp_path / "mixed/report.json").read_text())["rejected"]
    reasons = [why for _, why in lines if why]
    assert {why: entry["count"] for why, entry in report.items()} == {why: reasons.count(why) for why in set(reasons)}
    assert all(set(entry["examples"]) <= {record for record, _ in expected} for entry in report.values())


def test_ids_beyond_the_vocabulary_are_rejected(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such ids from a faulty tokenizer must not reach the embedding."""
    real = HuggingFaceTokenizer.encode_similar

    def wrong(self: HuggingFaceTokenizer, texts: list[str]) -> list[list[int]]:
        return [[*ids, self.vocab_size] if "blue" in text else ids for text, ids in zip(texts, real(self, texts))]

    monkeypatch.setattr(HuggingFaceTokenizer, "encode_similar", wrong)
    (tmp_path / "t.jsonl").write_text('{"text": "red"}\n{"text": "blue"}\n{"text": "green"}\n')
    assert run_preprocess([tmp_path / "t.jsonl"], tokenizer=tokenizer, output=tmp_path / "out") == 0
    reject = json.loads((tmp_path / "out/rejects.jsonl").read_text())
    assert reject["reason"] == "token_id" and reject["record"].endswith("t.jsonl:2")
    assert "outside its vocabulary" in reject["detail"]


def test_batch_size_does_not_change_the_output(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = make_images(tmp_path / "images", count=9)
    records = [{"image": name, "text": f"A red thing, {n}."} for n, name in enumerate(names)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for size in (1, 256):
        monkeypatch.setattr(task, "_BATCH", size)
        inputs = [tmp_path / "c.jsonl"]
        assert run_preprocess(inputs, tokenizer=tokenizer, output=tmp_path / str(size)) == 0
    files = {file.name for file in (tmp_path / "1").iterdir() if file.is_file()}
    assert files and all(
        (tmp_path / "1" / name).read_bytes() == (tmp_path / "256" / name).read_bytes() for name in files
    )
