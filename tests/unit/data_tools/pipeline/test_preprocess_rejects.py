"""Bad input: each record is rejected with its reason and line, and each mistake gives one message."""

import base64
import json
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.corpus_files import (
    IMAGE_TOKENS,
    arguments,
    make_corpus,
    make_images,
    make_tokenizer,
    run_preprocess,
    write_jsonl,
)

ROOT = Path(__file__).parents[4]
TALK = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _reasons(out: Path) -> dict[str, list[int]]:
    """Line numbers of rejected records by reason."""
    found: dict[str, list[int]] = {}
    for line in (out / "rejects.jsonl").read_text().splitlines():
        reject = json.loads(line)
        found.setdefault(reject["reason"], []).append(int(reject["record"].rsplit(":", 1)[1]))
    report = json.loads((out / "report.json").read_text())["rejected"]
    assert {reason: entry["count"] for reason, entry in report.items()} == {r: len(n) for r, n in found.items()}
    return found


def test_bad_lines_leave_the_others_unchanged(tokenizer: Path, tmp_path: Path) -> None:
    good = [json.dumps({"text": f"red {n}"}).encode() for n in range(10)]
    bad = [b'{"text": "\xff"}', b"{", b'{"text": "a\0b"}', b'{"txt": "a"}', b'{"text": 3}', b'{"text": " "}', b"7"]
    bad += [b'{"text": "\\ud800"}', b"[" * 100_000]
    mixed = [*good[:5], *bad, b"", *good[5:]]
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join(good))
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(mixed) + b"\n")
    for name in ("clean", "mixed"):
        assert run_preprocess([tmp_path / f"{name}.jsonl"], tokenizer=tokenizer, output=tmp_path / name) == 0
    for suffix in ("bin", "idx"):
        first, second = ((tmp_path / name / f"text-00000.tokens.{suffix}").read_bytes() for name in ("clean", "mixed"))
        assert first == second
    assert _reasons(tmp_path / "mixed") == {
        "encoding": [6, 13],
        "json": [7, 8, 14],
        "record": [9, 10, 12],
        "empty_text": [11],
    }


def test_bad_conversations_are_rejected(tokenizer: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", count=4)
    image = "images/1.png"
    talks: list[dict[str, Any]] = [
        {"image": image, "conversations": TALK},
        {"image": image, "conversations": [TALK[1], TALK[1]]},
        {"conversations": TALK},
        {"images": [image, image], "conversations": TALK},
        {"image": image, "conversations": TALK[:1]},
        {"image": image, "conversations": [TALK[0], {"from": "narrator", "value": "x"}]},
        {"images": [image] * 3, "conversations": [{"from": "human", "value": "<image>" * 3}, TALK[1]]},
        {"image": image, "conversations": [TALK[0], {"from": "gpt", "value": "red " * 400}]},
        {"image": 5, "conversations": TALK},
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
        {"image": image, "conversations": [{"from": "human", "value": "<image_placeholder> Where?"}, TALK[1]]},
    ]
    path = write_jsonl(tmp_path / "talks.jsonl", talks)
    more = ["--max-bad-frac", "0.9"]
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    assert _reasons(tmp_path / "out") == {
        "tag_count": [2, 3, 4],
        "turns": [5],
        "record": [6, 9],
        "too_many_images": [7],
        "too_long": [8],
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["samples"], report["images"]) == (3, 2)


def test_deepseek_records_need_matching_tags(tokenizer: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", count=2)
    question = {"role": "User", "content": "<image_placeholder>What?", "images": ["images/0.jpg"]}
    answer = {"role": "Assistant", "content": "red"}
    records = [[question, answer], {"conversations": [question, answer]}, [{**question, "images": []}, answer]]
    path = write_jsonl(tmp_path / "talks.jsonl", records)
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 0
    assert _reasons(tmp_path / "out") == {"tag_count": [3]}


def test_bad_images_are_rejected(tokenizer: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_images(root / "images", count=30)
    (tmp_path / "secret.png").write_bytes((root / "images/1.png").read_bytes())
    (root / "images/empty.png").write_bytes(b"")
    (root / "images/page.jpg").write_bytes(b"<html></html>")
    Image.effect_noise((300, 300), 50).save(root / "images/cut.jpg")
    (root / "images/cut.jpg").write_bytes((root / "images/cut.jpg").read_bytes()[:-80])
    Image.new("1", (12_000, 12_000)).save(root / "images/large.png")
    Image.new("1", (1, 4_000)).save(root / "images/narrow.png")
    inline = base64.b64encode((root / "images/1.png").read_bytes()).decode()
    names = [
        *("images/1.png", "images/gone.png", "images/empty.png", "images/page.jpg", "images/cut.jpg"),
        *("images/large.png", "images/narrow.png", "../secret.png", str(tmp_path / "secret.png"), "images"),
        *("https://example.org/x.png", f"data:image/png;base64,{inline}", "data:image/png;base64,???", "a\0b"),
        *(f"images/{n}.png" for n in range(1, 30) if n % 3),
    ]
    path = write_jsonl(root / "c.jsonl", [{"image": name, "text": "a thing"} for name in names])
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out") == 0
    assert _reasons(tmp_path / "out") == {
        "image_missing": [2, 10, 14],
        "image_empty": [3],
        "image_format": [4, 13],
        "image_truncated": [5],
        "image_too_large": [6],
        "image_aspect": [7],
        "image_outside_root": [8, 9],
        "image_address": [11],
    }


def test_large_images_are_shrunk(tokenizer: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", count=3)
    Image.effect_noise((400, 200), 50).save(tmp_path / "images/1.png")
    path = write_jsonl(tmp_path / "c.jsonl", [{"image": f"images/{n}.png", "text": "x"} for n in (1, 2)])
    more = ["--max-side", "100"]
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    sizes = [(row["width"], row["height"], row["format"]) for row in _table(tmp_path / "out")]
    assert sizes == [(100, 50, 0), (22, 32, 1)]


def _table(out: Path) -> Any:
    return np.load(out / "multimodal-00000.images.npy")


def test_too_many_rejects_leave_no_dataset(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "red"}, {"text": ""}, {"text": ""}])
    out = tmp_path / "out"
    assert run_preprocess([path], tokenizer=tokenizer, output=out) == 3
    message = capsys.readouterr().err
    assert "2 of 3 records rejected (empty_text 2), above --max-bad-frac 0.5" in message
    assert not (out / "manifest.json").exists()
    assert _reasons(out) == {"empty_text": [2, 3]}
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--max-bad-frac", "0.7"]) == 0


def test_on_error_fail_stops_at_the_record(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "red"}, {"text": ""}])
    out = tmp_path / "out"
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--on-error", "fail"]) == 3
    assert f"error: {path}:2: empty_text: text is empty; " in capsys.readouterr().err
    assert Counter(file.suffix for file in out.iterdir() if file.is_file()) == {".json": 1}, "nothing half-written"


@pytest.mark.parametrize(
    ("records", "more", "code", "message"),
    [
        ([{"text": "a"}], ["--template", "deepseek"], 2, "--template deepseek: .* has format text, which has no turns"),
        ([{"prompt": ""}], [], 2, "format not recognised .*keys prompt.*known formats are text, caption"),
        ([], [], 2, "format not recognised"),
        (
            [{"image": "x.png", "text": "a"}],
            ["--seq-length", str(IMAGE_TOKENS)],
            2,
            f"--seq-length {IMAGE_TOKENS}: cannot hold one image of {IMAGE_TOKENS} tokens",
        ),
        ([{"text": "a"}], ["--task", "3"], 2, "--task 3: must be from 0 to --num-tasks 1"),
        ([{"text": "a"}], ["--tokenizer", "nowhere"], 2, "nowhere: no such tokenizer"),
        ([{"text": "a"}], ["--tokenizer", "no/such/file.json"], 3, "no/such/file.json: no such tokenizer"),
        ([{"text": "a"}], ["--input", "gone.jsonl"], 2, r"--input gone\.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_message(
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: list[Any],
    more: list[str],
    code: int,
    message: str,
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", records)
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=more) == code
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", error), error
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_partial_file(tokenizer: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", count=2)
    Image.effect_noise((600, 600), 90).save(tmp_path / "images/big.png")
    path = write_jsonl(tmp_path / "c.jsonl", [{"image": "images/big.png", "text": "noise"}])
    out = tmp_path / "out"
    command = [sys.executable, "data_tools/preprocess.py", *arguments([path], tokenizer=tokenizer, output=out)]
    limited = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert limited.returncode == 5, limited.stderr
    assert "images.bin" in limited.stderr and "cannot write" in limited.stderr and "Traceback" not in limited.stderr
    assert [file.name for file in out.iterdir() if file.is_file()] == ["job.json"]
    assert run_preprocess([path], tokenizer=tokenizer, output=out) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A separate file system, whose size can be changed while it holds files."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(size: str) -> Path:
        options = f"size={size}" if not os.path.ismount(disk) else f"remount,size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here")
        return disk

    yield sized
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


def test_run_resumes_after_the_disk_was_full(
    tokenizer: Path, tmp_path: Path, small_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_corpus(tmp_path / "in", images=40, texts=150, note="x" * 5000)[:2]
    whole = tmp_path / "whole"
    assert run_preprocess(inputs, tokenizer=tokenizer, output=whole) == 0
    out = small_disk("100k") / "out"
    assert run_preprocess(inputs, tokenizer=tokenizer, output=out) == 5
    error = capsys.readouterr().err
    assert "No space left on device" in error and "free or repair the storage" in error
    done = list(out.glob("units/[0-9]*[0-9].json"))
    assert done and not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))
    small_disk("50m")
    assert run_preprocess(inputs, tokenizer=tokenizer, output=out) == 0
    assert f"{len(done)} of " in capsys.readouterr().out
    for file in (file for file in whole.rglob("*") if file.is_file() and "lock" not in file.name):
        assert (out / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_links_out_of_the_image_root_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    real, outside = tmp_path / "real", tmp_path / "outside"
    make_images(real / "images", count=2)
    make_images(outside / "images", count=2)
    (tmp_path / "realistic").mkdir()
    make_images(tmp_path / "realistic/images", count=2)
    (real / "file.png").symlink_to(outside / "images/1.png")
    (real / "folder").symlink_to(outside / "images")
    (real / "twice").symlink_to("folder/1.png")
    (real / "beside").symlink_to("../realistic/images/1.png")
    (real / "kept.png").symlink_to("images/1.png")
    (real / "nothing.png").symlink_to("images/gone.png")
    (real / "loop.png").symlink_to("loop.png")
    root = tmp_path / "root"
    root.symlink_to(real)
    bad = ["file.png", "folder/1.png", "twice", "beside", "folder/../../outside/images/1.png", "gone/../../real/x.png"]
    good = ["images/1.png", "kept.png", f"{root}/images/1.png"]
    missing = ["nothing.png", "loop.png", "a\0b.png"]
    names = [*bad, *good, *missing]
    path = write_jsonl(tmp_path / "c.jsonl", [{"image": name, "text": "red"} for name in names])
    more = ["--image-root", str(root), "--max-bad-frac", "0.9"]
    assert run_preprocess([path], tokenizer=tokenizer, output=tmp_path / "out", more=more) == 0
    assert _reasons(tmp_path / "out") == {"image_outside_root": [1, 2, 3, 4, 5, 6], "image_missing": [10, 11, 12]}
    details = [json.loads(line)["detail"] for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert all(f"outside --image-root {root}" in detail for detail in details[:6])
    assert f"leads to {outside / 'images/1.png'}" in details[0]
