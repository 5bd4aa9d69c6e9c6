"""OpenAI-style messages, and images inside records."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.data.corpus_files import run_preprocess, write_jsonl
from tests.unit.data_tools.format_files import IMAGE, Expected, picture, read_back, rejects, shard_bytes

ASK = {"role": "user", "content": "Which?"}
SAY = {"role": "assistant", "content": "red"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(picture(number))
    return tmp_path


def _url(data: bytes, *, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _talk(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, SAY], **more}


def _run(root: Path, tokenizer: Path, records: list[Any], *more: str, name: str = "in") -> Path:
    path = root / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = root / f"out-{name}"
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--max-bad-frac", "0.95", *more]) == 0
    return out


def test_messages_in_every_spelling(root: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"type": "text", "text": "Which?"}
    named = {"type": "image", "image": "images/0.png"}
    inline = {"type": "image_url", "image_url": {"url": _url(picture(9, kind="JPEG"), kind="jpeg")}}
    records = [
        {"id": 1, "messages": [{"role": "user", "content": "<image>Which?"}, SAY], "images": ["images/1.png"]},
        {"messages": [{"role": "system", "content": "Look."}, ASK, SAY, ASK, {"role": "assistant", "content": "No."}]},
        _talk(named, text),
        _talk(text, inline, {"type": "image_url", "image_url": "images/2.png"}),
        _talk({"type": "image"}, text, {"type": "image", "path": "images/3.png"}, images=["images/0.png"]),
        _talk({"type": "text", "text": "A"}, {"type": "text", "text": "<image>B"}, images=[_url(picture(8))]),
    ]
    out = _run(root, tokenizer, records)
    assert "format messages (recognised), template deepseek" in capsys.readouterr().out
    expect = Expected(tokenizer).conversation
    found = {sample.position: sample for sample in read_back(out)}
    assert found == {
        1: expect((f"{IMAGE}Which?", "red"), position=1, images=[picture(1)]),
        2: expect(("Which?", "red"), ("Which?", "No."), position=2, system="Look."),
        3: expect((f"{IMAGE}Which?", "red"), position=3, images=[picture(0)]),
        4: expect((f"Which?{IMAGE}{IMAGE}", "red"), position=4, images=[picture(9, kind="JPEG"), picture(2)]),
        5: expect((f"{IMAGE}Which?{IMAGE}", "red"), position=5, images=[picture(0), picture(3)]),
        6: expect((f"A{IMAGE}B", "red"), position=6, images=[picture(8)]),
    }


def test_bad_messages_leave_the_others_unchanged(root: Path, tokenizer: Path) -> None:
    good = [
        _talk({"type": "image", "image": f"images/{number}.png"}, {"type": "text", "text": "?"}) for number in (0, 1)
    ]
    image = {"type": "image", "image": "images/0.png"}
    bad: list[tuple[str, Any]] = [
        ("tag_count", _talk({"type": "image"}, {"type": "text", "text": "?"})),
        ("tag_count", _talk({"type": "text", "text": "<image>?"})),
        ("tag_count", _talk({"type": "text", "text": "?"}, images=["images/0.png"] * 2)),
        ("unsupported_media", _talk({"type": "audio", "audio": "a.wav"})),
        ("record", _talk({"type": "image", "image": "images/0.png", "url": "images/1.png"})),
        ("record", _talk({"type": "image_url"})),
        ("record", _talk({"type": "text", "text": 3})),
        ("record", _talk("bare")),
        ("record", {"messages": [ASK, {"role": "tool", "content": "x"}]}),
        ("record", {"messages": [ASK, {"role": "assistant", "content": None}]}),
        ("record", {"messages": []}),
        ("turns", {"messages": [SAY, ASK]}),
        ("turns", {"messages": [ASK]}),
        ("turns", {"messages": [ASK, {"role": "assistant", "content": " "}]}),
        ("too_many_images", _talk(image, image, image)),
        ("image_outside_root", _talk({"type": "image", "image": "../secret.png"})),
        ("image_outside_root", _talk({"type": "image", "image": "/etc/passwd"})),
        ("image_address", _talk({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})),
        ("image_outside_root", _talk({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})),
        ("image_address", _talk({"type": "image_url", "image_url": {"url": "file://host/etc/passwd"}})),
        ("encoding", _talk({"type": "text", "text": "\ud800"})),
    ]
    clean = _run(root, tokenizer, good, name="clean")
    mixed = _run(root, tokenizer, [good[0], *(record for _, record in bad), good[1]], "--format", "messages")
    assert sorted(rejects(mixed)) == sorted(
        (reason, f"in.jsonl:{position}") for position, (reason, _) in enumerate(bad, start=2)
    )
    assert shard_bytes(mixed) == shard_bytes(clean)


def test_inline_images_work_wherever_paths_do(root: Path, tokenizer: Path) -> None:
    urls = [_url(picture(number)) for number in range(4)]
    turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "red"}]
    user = {"role": "User", "content": "<image>Which?", "images": [urls[2]]}
    inputs = [
        write_jsonl(root / "caption.jsonl", [{"image": urls[0], "text": "A thing."}]),
        write_jsonl(root / "llava.jsonl", [{"image": urls[1], "conversations": turns}]),
        write_jsonl(root / "deepseek.jsonl", [{"conversations": [user, {"role": "Assistant", "content": "red"}]}]),
        write_jsonl(root / "mmc4.jsonl", [_mmc4(urls[3])]),
    ]
    assert run_preprocess(inputs, tokenizer=tokenizer, output=root / "out") == 0
    expect = Expected(tokenizer)
    assert read_back(root / "out") == [
        expect.document(picture(0), "A thing.", position=1),
        expect.conversation((f"{IMAGE}Which?", "red"), position=1, images=[picture(1)]),
        expect.conversation((f"{IMAGE}Which?", "red"), position=1, images=[picture(2)]),
        expect.document(picture(3), "One.", position=1),
    ]


def _mmc4(name: str) -> dict[str, Any]:
    info = {"image_name": name, "matched_text_index": 0, "matched_sim": 0.3}
    return {"text_list": ["One."], "image_info": [info]}


def test_hostile_data_urls_are_rejected(root: Path, tokenizer: Path) -> None:
    code = base64.b64encode(picture(1)).decode()
    cases = {
        "image_format": [
            "data:image/png;base64,????",
            "data:image/png;base64," + code[:41],
            "data:image/png;base64," + code[:40] + "*" + code[40:],
            "data:image/png;base64," + "\ud800" + code,
            "data:image/png,\ud800" + code,
            "data:",
            "data:image/png;base64",
            _url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", kind="svg+xml"),
            _url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", kind="eps"),
        ],
        "image_empty": ["data:image/png;base64,"],
        "image_truncated": [_url(picture(1, size=(99, 99))[:-30])],
        "image_too_large": [_url(_large())],
        "image_aspect": [_url(picture(1, size=(1, 200_000)))],
    }
    records = [_talk({"type": "image", "image": url}) for urls in cases.values() for url in urls]
    good = _talk({"type": "image", "image": "images/0.png"})
    mixed = _run(root, tokenizer, [*records, good], name="mixed")
    assert [reason for reason, _ in rejects(mixed)] == [reason for reason, urls in cases.items() for _ in urls]
    clean = _run(root, tokenizer, [good], name="clean")
    assert [(s.ids, s.images) for s in read_back(mixed)] == [(s.ids, s.images) for s in read_back(clean)]


def test_inline_image_above_the_limit_is_not_decoded(
    root: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.pipeline.image_source.MAX_IMAGE", 200)
    records = [_talk({"type": "image", "image": url}) for url in (_url(b"x" * 300), _url(picture(1)))]
    assert rejects(_run(root, tokenizer, records)) == [("image_too_large", "in.jsonl:1")]


def _large() -> bytes:
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    return out.getvalue()
