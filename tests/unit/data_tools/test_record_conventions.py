"""Records as people publish them: what each convention means, and what is refused by its name."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from data_tools.readers.formats import count_ignored, read_record
from data_tools.readers.record import Picture, Record, RecordError, parse_json

I = "<image_placeholder>"  # noqa: E741
JPEG = b"\xff\xd8\xff\xe0" + bytes(40)
STRUCT = {"bytes": JPEG, "path": None}
BASE64 = "/9j/" + "A" * 200
ASKS = {"from": "human", "value": "<image>\nWhat?"}
TEXT = {"from": "human", "value": "What?"}
SAYS = {"from": "gpt", "value": "red"}
USER, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
DEEP: Any = []
for _ in range(3000):
    DEEP = [DEEP]


def _read(raw: Any, **columns: str) -> Record:
    return read_record(raw, format=None, columns=columns)


def _names(record: Record) -> list[str]:
    return [picture.name for picture in record.pictures]


PAGE = json.dumps(
    [{"document_url": "http://x/p", "src": "http://x/a.jpg", "unformatted_src": "http://x/a.jpg?w=9"}, None]
)
WEB = {
    "images": ["a.jpg", None],
    "texts": [None, "Hello."],
    "metadata": PAGE,
    "general_metadata": '{"url": "http://x"}',
}
INFO = {"image_name": "a.jpg", "raw_url": "http://x/a.jpg", "matched_text_index": 0, "matched_sim": 0.3}
MMC4 = {"text_list": ["Hello."], "image_info": [INFO], "url": "http://x", "similarity_matrix": [[0.3]]}


def _parts(*content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, REPLY]}


@pytest.mark.parametrize(
    ("raw", "images", "first"),
    [
        ({"conversations": [ASKS, SAYS], "image": "a.jpg"}, ["a.jpg"], f"{I}\nWhat?"),
        ({"conversations": [{**ASKS, "image": "a.jpg"}, SAYS]}, ["a.jpg"], f"{I}\nWhat?"),
        ({"conversations": [ASKS, SAYS], "image": "a.jpg", "images": ["a.jpg"]}, ["a.jpg"], f"{I}\nWhat?"),
        ({"conversations": [ASKS, SAYS], "image": "a.jpg", "id": "x/a_1.jpg"}, ["a.jpg"], f"{I}\nWhat?"),
        (
            {
                "conversations": [{"from": "human", "value": "<image><image>?"}, SAYS],
                "image": ["a.jpg", "b.jpg"],
                "metadata": {"dataset": "d"},
                "choice_list": None,
            },
            ["a.jpg", "b.jpg"],
            f"{I}{I}?",
        ),
        (
            {
                "conversations": '[{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]',
                "image": "a.jpg",
            },
            ["a.jpg"],
            f"{I}Q",
        ),
        (
            {"conversations": {"from": ["human", "gpt"], "value": ["<image>Q", "A"]}, "image": "a.jpg"},
            ["a.jpg"],
            f"{I}Q",
        ),
        (
            {"images": [STRUCT, STRUCT], "texts": [{"user": "Q", "assistant": "A", "source": "s"}]},
            ["images"] * 2,
            f"{I}{I}Q",
        ),
        ({"images": [], "texts": [{"user": "Q", "assistant": "A"}], "relevance_ratings": [1]}, [], "Q"),
        (
            {
                "images": [STRUCT],
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"index": None, "text": "Q", "type": "text"},
                            {"index": 0, "text": None, "type": "image"},
                        ],
                    },
                    REPLY,
                ],
            },
            ["images"],
            f"Q{I}",
        ),
        ({"images": ["a.jpg"], "prompt": [USER], "completion": [REPLY]}, ["a.jpg"], f"{I}Q"),
        ({"image": STRUCT, "prompt": [USER], "completion": [REPLY]}, ["image"], f"{I}Q"),
        ({"image": "a.jpg", "question": "Q", "answer": "A"}, ["a.jpg"], f"{I}Q"),
        ({"image": "a.jpg", "question": "Q", "answers": ["A", "A"]}, ["a.jpg"], f"{I}Q"),
        ({"instruction": "Q", "input": "X", "output": "A"}, [], "Q\nX"),
        ({"query": "<image>Q", "response": "A", "images": ["a.jpg"]}, ["a.jpg"], f"{I}Q"),
        ({"messages": [{"role": "USER", "content": "Q"}, {"role": "bot", "content": "A"}]}, [], "Q"),
        (
            _parts({"type": "input_image", "image_url": "a.jpg"}, {"type": "input_text", "text": "Q"}),
            ["a.jpg"],
            f"{I}Q",
        ),
        (
            _parts({"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": BASE64}}),
            [BASE64],
            I,
        ),
        (
            _parts({"type": "image", "image": "file:///data/a.jpg"}, {"type": "text", "text": "Q"}),
            ["file:///data/a.jpg"],
            f"{I}Q",
        ),
        ({"conversations": [ASKS, SAYS], "image": '["a.jpg"]'}, ["a.jpg"], f"{I}\nWhat?"),
        ({"conversations": [ASKS, SAYS], "image": "['a.jpg']"}, ["a.jpg"], f"{I}\nWhat?"),
        ({"conversations": [ASKS, SAYS], "image": "['a.jpg'\n 'b.jpg']"}, ["['a.jpg'\n 'b.jpg']"], f"{I}\nWhat?"),
        ({"conversations": repr([ASKS, SAYS]), "image": "a.jpg"}, ["a.jpg"], f"{I}\nWhat?"),
        ({"messages": repr([USER, REPLY]), "images": "[None]"}, [], "Q"),
        ({"conversations": [ASKS, SAYS], "images": ' [{"path": "a.jpg"}]'}, ["a.jpg"], f"{I}\nWhat?"),
        ({"conversations": [{**ASKS, "images": '["a.jpg"]'}, SAYS]}, ["a.jpg"], f"{I}\nWhat?"),
        ({"messages": json.dumps(_parts({"type": "image", "image": "a.jpg"})["messages"])}, ["a.jpg"], I),
        ({"messages": [{"role": "user", "content": '[{"type": "image", "image": "a.jpg"}]'}, REPLY]}, ["a.jpg"], I),
        (
            {"messages": [{"role": "user", "content": '[{"type": "x", "image": 1}]'}, REPLY]},
            [],
            '[{"type": "x", "image": 1}]',
        ),
        ({"conversations": [{"from": "human", "value": "<Image>\nQ"}, SAYS], "image": "a.jpg"}, ["a.jpg"], f"{I}\nQ"),
        ({"conversations": [TEXT, SAYS], "image": "[]"}, [], "What?"),
        ({"conversations": [TEXT, SAYS], "image": ""}, [], "What?"),
        ({"conversations": [TEXT, SAYS], "image": float("nan")}, [], "What?"),
        ({"conversations": [TEXT, SAYS], "image": "None"}, [], "What?"),
        ({"conversations": [TEXT, SAYS], "label": 3, "tools": "[]", "hint": None}, [], "What?"),
        ({"conversations": [TEXT, SAYS], "image": [""]}, [], "What?"),
        ({"conversations": [TEXT, SAYS], "images": [None]}, [], "What?"),
        ({"conversations": [TEXT, SAYS], "image": {"bytes": None, "path": None}}, [], "What?"),
    ],
)
def test_conversations_of_every_convention(raw: Any, images: list[str], first: str) -> None:
    record = _read(raw)
    assert _names(record) == images
    assert [turn.role for turn in record.turns] == ["user", "assistant"]
    assert record.turns[0].text == first and record.turns[0].tags is None


@pytest.mark.parametrize(
    ("raw", "image", "text"),
    [
        ({"image": "a.jpg", "caption": "red"}, "a.jpg", "red"),
        ({"image_url": "http://x/a.jpg", "caption": "red"}, "http://x/a.jpg", "red"),
        ({"image": {"url": "http://x/a.jpg"}, "text": "red"}, "http://x/a.jpg", "red"),
        ({"jpg": JPEG, "caption": "red", "url": "http://x/y.jpg", "key": "1", "status": "success"}, "jpg", "red"),
        ({"file_name": "0001.png", "text": "red"}, "0001.png", "red"),
        ({"image": {"bytes": JPEG, "path": "a.jpg"}, "file_name": "x/a.jpg", "text": "red"}, "a.jpg", "red"),
        ({"image": STRUCT, "image_path": "a.jpg", "text": "red"}, "image", "red"),
        ({"image": "a.jpg", "text": "See ![figure](<image>)."}, "a.jpg", "See ![figure](<image>)."),
        ({"image": "a.jpg", "text": f"Say {I} twice: <image>"}, "a.jpg", f"Say {I} twice: <image>"),
        ({"image": "a.jpg", "text": "<image>\nred"}, "a.jpg", "red"),
    ],
)
def test_captions_of_every_convention(raw: Any, image: str, text: str) -> None:
    record = _read(raw)
    assert [part.name if isinstance(part, Picture) else part for part in record.parts] == [image, text]


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("unsupported_media", {"video": "x.mp4", "conversations": [TEXT, SAYS]}),
        ("unsupported_media", {"videos": ["x"], "messages": [USER, REPLY]}),
        ("unsupported_media", {"image": "a.jpg", "audio": "x.wav", "conversations": [ASKS, SAYS]}),
        ("unsupported_media", {"audio": {"array": [0.1], "sampling_rate": 16000}, "text": "red"}),
        ("unsupported_media", {"audio": {"bytes": b"ID3", "path": None}, "text": "red"}),
        ("unsupported_media", {"file_name": "a.mp4", "text": "red"}),
        ("unsupported_media", {"clip": "clips/x.webm", "text": "red"}),
        ("unsupported_media", _parts({"type": "video", "video": "x.mp4"}, {"type": "text", "text": "Q"})),
        ("unsupported_media", _parts({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})),
        ("unsupported_media", {"conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>"}, SAYS]}),
        ("unsupported_media", {"conversations": [{"from": "user", "value": "<|vision_start|><|image_pad|>Q"}, SAYS]}),
        ("unsupported_media", {"conversations": [{"from": "user", "value": "<video>\nQ"}, SAYS]}),
        ("unsupported_media", {"conversations": [{"from": "user", "value": "Q"}, {"from": "gpt", "value": "<bbox>"}]}),
        ("unsupported_media", {"question": "<image 1> Q", "image_1": STRUCT, "answer": "A"}),
        ("unused_image", {"photo": "a.jpg", "text": "red"}),
        ("unused_image", {"picture": "a.jpg", "caption": "red"}),
        ("unused_image", {"img_b64": BASE64, "text": "red"}),
        ("unused_image", {"media": '["a.jpg"]', "text": "red"}),
        ("unused_image", {"meta": '{"shown": ["x/y.png"]}', "conversations": [TEXT, SAYS]}),
        ("unused_image", {"meta": "{'shown': ['x/y.png']}", "conversations": [TEXT, SAYS]}),
        ("unused_image", {"images": "['a.jpg', 'b.jpg']", "image": "a.jpg", "text": "red"}),
        ("unused_image", {"conversations": [ASKS, SAYS], "image": repr(STRUCT)}),
        ("record", {"conversations": f"[{TEXT!r}\n {SAYS!r}]", "text": "red"}),
        ("record", {"messages": "[{'role': 'user', 'content': nan}]", "text": "red"}),
        ("unused_image", {"pdf_path": "a.pdf", "conversations": [TEXT, SAYS]}),
        ("unused_image", {"pdf_path": "a.pdf", "image": "b.jpg", "text": "red"}),
        ("unused_image", {"pdf_path": "a.png", "text": "red"}),
        ("unsupported_media", {"clips": '["x.mp4"]', "text": "red"}),
        ("unused_image", {"picture": "a.svg", "text": "red"}),
        ("unused_image", {"figure_path": "a.EPS", "text": "red"}),
        ("unused_image", {"image_2": "a.pdf", "image": "b.jpg", "text": "red"}),
        ("unused_image", {"pdf": "a.pdf", "conversations": [TEXT, SAYS]}),
        ("unused_image", {"attachments": ["a.docx"], "messages": [USER, REPLY]}),
        ("unused_image", {"point_cloud": "scans/a.ply", "conversations": [TEXT, SAYS]}),
        ("unused_image", {"video_features": "a.npy", "conversations": [TEXT, SAYS]}),
        ("tag_count", {"conversations": [{"from": "human", "value": "<IMAGE>\nWhat?"}, SAYS]}),
        ("unused_image", {"paper": "data:application/pdf;base64,AAAA", "text": "red"}),
        ("unused_image", {"paper": {"bytes": b"%PDF-1.7", "path": None}, "text": "red"}),
        ("unused_image", {**WEB, "more_images": ["b.jpg"]}),
        ("unused_image", {**MMC4, "more_images": ["http://x/b.jpg"]}),
        ("unused_image", {"thumb": {"bytes": JPEG, "path": None}, "text": "red"}),
        ("unused_image", {"meta": {"files": [{"p": "x/y.png"}]}, "text": "red"}),
        ("unused_image", {"meta": "data:image/png;base64,AAAA", "text": "red"}),
        ("unused_image", {"url": "https://x/y.jpg", "text": "red"}),
        ("unused_image", {"image": "a.jpg", "image_2": "b.jpg", "text": "red"}),
        ("unused_image", {"image": "a.jpg", "images": [{"url": "http://x/b.jpg"}], "text": "red"}),
        ("unused_image", {"image": STRUCT, "depth": {"bytes": b"\x89PNG1", "path": None}, "text": "red"}),
        ("unused_image", {"image": "a.jpg", "images": ["b.jpg"], "conversations": [ASKS, SAYS]}),
        ("unused_image", {"conversations": [{**TEXT, "attachments": ["a.png"]}, SAYS]}),
        ("unused_image", {"conversations": [TEXT, {**SAYS, "value": f"![](data:image/png;base64,{BASE64})"}]}),
        (
            "unused_image",
            {"image": {"bytes": JPEG, "path": "0.png"}, "edge": {"bytes": b"\x89PNG", "path": "0.png"}, "text": "a"},
        ),
        ("unused_image", {"image": "rgb/1.png", "depth": "depth/1.png", "text": "red"}),
        ("unused_image", {"image": STRUCT, "second_image_path": "b.png", "text": "red"}),
        ("unused_image", {"images": [STRUCT], "image_paths": ["a.png", "b.png"], "text": "red"}),
        ("unused_image", {"image": "a.jpg", "original": "b.jpg", "text": "red"}),
        ("unused_image", {"photo": "my photos/dog 1.jpg", "text": "red"}),
        ("unused_image", {"photo": "https://example.org/photo-1?w=5", "text": "red"}),
        ("unsupported_media", {"video": 4010069381, "question": "Q", "answer": "A"}),
        ("unsupported_media", {"audio": [0.1, 0.2], "text": "red"}),
        ("unsupported_media", {"video": [[[1, 2]]], "conversations": [TEXT, SAYS]}),
        ("unused_image", {"pixel_values": [[1, 2]], "text": "red"}),
        ("image_missing", {"youtube_id": "x1", "conversations": [TEXT, SAYS]}),
        ("image_missing", {"image_id": "2412112", "question": "Q", "answer": "A"}),
        ("unsupported_field", {"image": "a.jpg", "text": '{"question": "Q", "chosen": "A", "rejected": "B"}'}),
        ("unsupported_field", {"messages": [USER, {**REPLY, "train_detail": [{"begin": 0}]}]}),
        ("unsupported_field", {"messages": [USER, {**REPLY, "labels": [-100]}]}),
        ("unsupported_field", {"messages": [USER, REPLY], "mask": "Assistant"}),
        ("unsupported_field", {"messages": [USER, REPLY], "kto_tag": True, "chat_template_kwargs": {"tools": ["f"]}}),
        ("unsupported_field", {"messages": [USER, REPLY], "history": [["q", "a"]]}),
        ("unsupported_field", {"image": STRUCT, "question": "Q", "A": "x", "B": "y", "answer": "A"}),
        ("unsupported_field", {"question": "Q", "passage": "Read.", "answer": "A"}),
        ("unsupported_field", {"image": "a.jpg", "text": "red", "question": "Q"}),
        ("record", {"messages": [USER, REPLY], "conversations": [TEXT, SAYS]}),
        ("tag_count", {"image": "a.jpg", "conversations": [TEXT, {"from": "gpt", "value": "<image>"}]}),
        ("tag_count", {"conversations": [{"from": "human", "value": "Image 1: <image>\nDiffer?"}, SAYS]}),
        ("tag_count", {"image": None, "text": "<image>\nA man"}),
        ("tag_count", {"images": ["a.jpg", "b.jpg"], **_parts({"type": "image", "index": 0.5}, {"type": "image"})}),
        (
            "unsupported_media",
            {"image": "a.jpg", "conversations": [{"from": "human", "value": "<video><image>Q"}, SAYS]},
        ),
        ("unsupported_media", {"image": "a.jpg", "text": "<video>\nA man runs."}),
        ("unsupported_media", {"conversations": [{"from": "human", "value": "<IMG_CONTEXT>Q"}, SAYS]}),
        ("json", {"text": "a", "meta": DEEP}),
        ("image_missing", {"jpg": None, "caption": "red", "url": "http://x/y.jpg", "status": "failed_to_download"}),
        ("tag_count", {"conversations": [ASKS, SAYS]}),
        ("tag_count", {"image": None, "conversations": [ASKS, SAYS]}),
        ("tag_count", {"images": ["a.jpg", "b.jpg"], "conversations": [TEXT, SAYS]}),
        ("tag_count", {"images": ["a.jpg"], **_parts({"type": "image", "index": 1})}),
        ("unsupported_field", {"tools": [{"name": "f"}], "messages": [USER, REPLY]}),
        ("unsupported_field", {"rejected_response": "B", "messages": [USER, REPLY]}),
        ("unsupported_field", {"messages": [USER, {**REPLY, "tool_calls": [{"id": 1}]}]}),
        ("unsupported_field", {"messages": [USER, {**REPLY, "reasoning_content": "Hm."}]}),
        ("unsupported_field", {"messages": [USER, {**REPLY, "weight": 0.5}]}),
        ("unsupported_field", {"messages": [{**USER, "loss": True}, REPLY]}),
        ("unsupported_field", {"image": "a.jpg", "question": "Q", "choices": ["A", "B"], "answer": "A"}),
        ("record", {"image": "a.jpg", "question": "Q", "answers": ["A", "B"]}),
        ("record", {"messages": [USER, {"role": "tool", "content": "x"}, REPLY]}),
        ("record", {"system": "A", "messages": [{"role": "system", "content": "B"}, USER, REPLY]}),
        ("empty_text", {"image": "a.jpg", "caption": None}),
    ],
)
def test_what_would_vanish_or_change_is_refused(reason: str, raw: Any) -> None:
    with pytest.raises(RecordError) as caught:
        _read(raw)
    assert caught.value.reason == reason, caught.value


@pytest.mark.parametrize(
    "raw",
    [
        {"text": "red", "url": "https://example.org/page.html", "meta": {"score": 0.5}},
        {"text": "<img src='a.png'> <image>"},
        {"text": "Plain.", "image": None},
        {"text": "[draft] {see} x.png", "note": "[1] {a: b}", "source": "papers/1.pdf", "url": "http://x/1.pdf"},
        *({"text": "x", "template": note} for note in ("{{}}", "{[1]: 2}", "[{{1}}]", "{{x}}", "{1, {2}}")),
        {"text": "Code", "exif": '{"Image Name": "a.jpg"}'},
        {"text": "Page", "pdf_path": "a/1.pdf", "meta": {"source_pdf_url": "http://x/1.pdf", "doc_file": "1.docx"}},
        {"messages": [{"role": "user", "content": "['x.png']"}, REPLY], "note": "['a']"},
        {"text": "icon", "path": "assets/icon.svg", "url": "https://example.org/File:Foo", "license": "mit"},
        {"conversations": [{"from": "human", "value": "What does <video>\n</video> do?"}, SAYS]},
        {"conversations": [{"from": "human", "value": "Explain <image_placeholder>."}, SAYS]},
        {
            "conversations": [
                {"from": "human", "value": "<image> is an SVG element?"},
                {"from": "gpt", "value": "<image>!"},
            ]
        },
    ],
)
def test_text_that_speaks_of_images_stays_text(raw: Any) -> None:
    record = _read(raw)
    assert not record.pictures
    assert all(turn.tags in (None, ()) and turn.text.count(I) == 0 or turn.tags == () for turn in record.turns)


@pytest.mark.parametrize(
    ("raw", "image"),
    [
        (WEB, "a.jpg"),
        ({**WEB, "metadata": json.loads(PAGE)}, "a.jpg"),
        ({**WEB, "images": [STRUCT, None]}, "images[0]"),
        ({**WEB, "images": ["http://x/a.jpg", None]}, "http://x/a.jpg"),
        ({**WEB, "image_urls": ["http://x/a.jpg", "http://x/logo.png"]}, "a.jpg"),
        (MMC4, "a.jpg"),
        ({**MMC4, "image_info": [{**INFO, "image_name": None}]}, ""),
        ({**MMC4, "urls": ["http://x/a.jpg", "http://x/logo.png"]}, "a.jpg"),
    ],
)
def test_addresses_of_web_documents_are_no_images(raw: Any, image: str) -> None:
    assert _names(_read(raw)) == [image]


def test_roles_of_other_names_are_given_by_columns() -> None:
    talk = [{"speaker": "Client", "said": "Q"}, {"speaker": "helper", "said": "A"}]
    columns = {"role": "speaker", "content": "said", "user": "client", "assistant": "helper"}
    member = {"key": "k", "images": (), "txt": None, "json": json.dumps({"conversations": talk}).encode()}
    struct = {key: [turn[key] for turn in talk] for key in ("speaker", "said")}
    for raw in ({"conversations": talk}, talk, {"conversations": json.dumps(talk)}, {"conversations": struct}, member):
        format = "webdataset" if raw is member else None
        record = read_record(raw, format=format, columns=columns)
        assert [(turn.role, turn.text) for turn in record.turns] == [("user", "Q"), ("assistant", "A")], raw
    with pytest.raises(RecordError, match=r"role is 'Client', which is none of system.*human.*--columns user="):
        _read({"conversations": talk}, role="speaker", content="said")


def test_ignored_keys_of_a_tar_member_are_left_out() -> None:
    picture = Picture(name="k.jpg", data=JPEG)
    raw = {"key": "k", "images": (picture,), "txt": None, "json": b'{"text": "red", "mask": "m.png"}'}
    ignore = ("mask", "images", "txt")
    assert _names(read_record(raw, format="webdataset", columns={}, ignore=ignore)) == ["k.jpg"]
    assert count_ignored(raw, columns={}, ignore=ignore)["images"] == 1


@pytest.mark.parametrize(("image", "empty"), [(None, True), ("", True), ([None], True), ("a.jpg", False)])
def test_an_empty_image_is_noted(image: Any, empty: bool) -> None:
    for rest in ({"question": "Q", "answer": "A"}, {"text": "red"}):
        assert _read({"image": image, **rest}).image_empty is empty
        assert not _read(rest).image_empty


def test_tags_in_an_answer_are_text() -> None:
    answer = {"from": "gpt", "value": f"![fig](<image>) {I}"}
    tagged = _read({"image": "a.jpg", "conversations": [ASKS, answer]})
    untagged = _read({"image": "a.jpg", "conversations": [TEXT, answer]})
    assert tagged.turns[1].text == untagged.turns[1].text == answer["value"]
    assert tagged.turns[1].tags == untagged.turns[1].tags == ()
    assert (tagged.untagged, untagged.untagged) == (0, 1)
    assert untagged.turns[0].text == f"{I}What?"


def test_image_parts_beside_text_that_spells_the_tag() -> None:
    record = _read(_parts({"type": "text", "text": f"No {I} here, "}, {"type": "image", "image": "a.jpg"}))
    assert (record.turns[0].text, record.turns[0].tags) == (f"No {I} here, {I}", (1,))


def test_index_may_be_a_float() -> None:
    parts = ({"type": "image", "index": 1.0}, {"type": "image", "index": 0.0})
    assert _names(_read({"images": ["a.jpg", "b.jpg"], **_parts(*parts)})) == ["b.jpg", "a.jpg"]


def test_members_of_a_tar_take_the_order_of_their_names() -> None:
    members = tuple(Picture(name=f"00/k.{n}.jpg", data=bytes([n])) for n in (1, 2))
    talk = {"images": ["2.jpg", "k.1.jpg"], "conversations": [{"from": "human", "value": "<image><image>"}, SAYS]}
    group = {"key": "k", "images": members, "txt": None, "json": json.dumps(talk).encode()}
    record = read_record(group, format="webdataset", columns={})
    assert _names(record) == ["00/k.2.jpg", "00/k.1.jpg"]


@pytest.mark.parametrize("text", ["x.ab?" * 200_000 + " z", "A" * 100 + " " * 15_000 + "!", "<image>" * 100_000])
def test_long_texts_take_no_time(text: str) -> None:
    """Each of these takes minutes where an expression goes back and forth."""
    with contextlib.suppress(RecordError):
        _read({"conversations": [{"from": "human", "value": f"Say {text} again"}, SAYS], "note": text})


def test_index_of_an_image_part_is_its_image() -> None:
    parts = ({"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "Q"})
    assert _names(_read({"images": ["a.jpg", "b.jpg"], **_parts(*parts)})) == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_system_prompt_beside_the_turns_is_used(key: str) -> None:
    record = _read({key: "Be a pirate.", "conversations": [TEXT, SAYS]})
    assert (record.turns[0].role, record.turns[0].text) == ("system", "Be a pirate.")


def test_turns_without_their_other_half_are_left_out() -> None:
    first = _read({"conversations": [SAYS, TEXT, SAYS]})
    last = _read({"conversations": [TEXT, SAYS, TEXT]})
    assert [turn.role for turn in first.turns] == [turn.role for turn in last.turns] == ["user", "assistant"]
    assert (first.left_out, last.left_out) == ({"leading_answer": 1}, {"unanswered": 1})
    assert first.messages == last.messages == 3
    with pytest.raises(RecordError, match="would be left out, but holds an image"):
        _read({"image": "a.jpg", "conversations": [TEXT, SAYS, ASKS]})


@pytest.mark.parametrize(
    "mask", [{"loss": False}, {"train": 0}, {"weight": 0}, {"train_on_turn": False}, {"masked": True}, {"ignore": 1}]
)
def test_answers_marked_as_not_learned(mask: dict[str, Any]) -> None:
    record = _read({"messages": [USER, {**REPLY, **mask}, USER, {**REPLY, "weight": 1}]})
    assert [turn.learned for turn in record.turns if turn.role == "assistant"] == [False, True]


def test_columns_give_keys_their_names() -> None:
    caption = _read({"photo": "a.jpg", "alt": "red", "text": "not this"}, image="photo", text="alt")
    assert _names(_read({"image": "b.jpg", "text": "red"}, image="photo")) == ["b.jpg"]
    with pytest.raises(RecordError, match="has image beside photo"):
        _read({"image": "b.jpg", "photo": "a.jpg", "text": "red"}, image="photo")
    assert [part.name if isinstance(part, Picture) else part for part in caption.parts] == ["a.jpg", "red"]
    talk = {"dialog": [{"speaker": "user", "said": "Q"}, {"speaker": "assistant", "said": "A"}]}
    record = _read(talk, conversations="dialog", role="speaker", content="said")
    assert [turn.text for turn in record.turns] == ["Q", "A"]


def test_ignored_keys_are_left_out_and_counted() -> None:
    raw = {"image": "a.jpg", "mask": "m.png", "meta": {"clip": "c.mp4"}, "text": "red"}
    ignore = ("mask", "clip")
    assert _names(read_record(raw, format=None, columns={}, ignore=ignore)) == ["a.jpg"]
    assert count_ignored(raw, columns={}, ignore=ignore) == {"images": 1, "videos": 1, "audio": 0}


def test_a_key_that_occurs_twice_is_refused() -> None:
    with pytest.raises(RecordError, match="the key 'image' occurs twice"):
        parse_json(b'{"image": "a.png", "image": "b.png", "text": "red"}')
