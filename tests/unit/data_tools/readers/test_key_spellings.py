"""Keys in every spelling, values as tables hold them, and what other frameworks call media and masks."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from data_tools.readers.formats import count_media, read_record
from data_tools.readers.record import Picture, Record, RecordError

JPEG = b"\xff\xd8\xff\xe0" + bytes(40)
CLIP = {"video": b"\0\0\0\x20ftypisom" + bytes(40), "audio": b"RIFF\0\0\0\0WAVEfmt " + bytes(40)}
ASKS, SAYS = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TALK = {"messages": [ASKS, SAYS]}


def _read(raw: Any) -> Record:
    return read_record(raw, format=None, columns={})


def _reason(raw: Any) -> str:
    with pytest.raises(RecordError) as caught:
        _read(raw)
    count_media(raw, columns={})
    return caught.value.reason


def _asked(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, SAYS], **more}


@pytest.mark.parametrize("key", ["imageUrl", "ImagePath", "imageurl", "imgUrl", "frames", "thumbnail", "screenshotUrl"])
def test_images_under_keys_of_any_spelling_are_refused(key: str) -> None:
    assert _reason({key: ["https://x.org/1?w=2"], "text": "red"}) == "unused_image"


@pytest.mark.parametrize("key", ["videoPath", "audioFile", "videourl", "speech", "voiceUrl"])
def test_clips_under_keys_of_any_spelling_are_refused(key: str) -> None:
    assert _reason({key: "https://x.org/1?w=2", **TALK}) == "unsupported_media"


@pytest.mark.parametrize("kind", CLIP)
def test_clips_are_known_by_their_first_bytes(kind: str) -> None:
    for value in (CLIP[kind], base64.b64encode(CLIP[kind]).decode()):
        raw = {"payload": value, "text": "red"}
        assert _reason(raw) == "unsupported_media"
        assert count_media(raw, columns={})["videos" if kind == "video" else kind] == 1


def test_an_address_with_a_size_is_an_image() -> None:
    assert _reason({"url": "https://x.org/1", "text": "red", "width": 640, "height": 480.0}) == "unused_image"
    assert not _read({"url": "https://x.org/1", "text": "red", "width": None, "height": 480}).pictures


@pytest.mark.parametrize("page", ["https://www.youtube.com/watch?v=1", "https://youtu.be/1", "https://vimeo.com/12"])
def test_answers_about_a_video_page_are_refused(page: str) -> None:
    assert _reason({"question": "What happens?", "answer": "A", "link": page}) == "image_missing"
    # A transcript stands on its own.
    assert _read({"text": "Hello and welcome.", "link": page}).parts


@pytest.mark.parametrize("key", ["depth", "depth_image", "edited", "target_path"])
def test_another_picture_of_the_same_name_is_refused(key: str) -> None:
    for name, other in (("a.jpg", "masks/a.jpg"), ("x/a.jpg", "a.jpg"), ("a.jpg", "a.jpg")):
        assert _reason({"image": name, key: other, "text": "red"}) == "unused_image"


@pytest.mark.parametrize("key", ["image_path", "fileName", "original_image", "img", "local_path", "source_file"])
def test_another_name_of_the_same_picture_is_used(key: str) -> None:
    assert [picture.name for picture in _read({"image": "a.jpg", key: "x/a.jpg", "text": "red"}).pictures] == ["a.jpg"]


FOREIGN = [
    *("<__dj__image> Q", "[IMG]\nQ", "<image1> Q", "<|IMG|> Q", "<im_patch> Q", "<img>\nQ", "<|media_pad|>Q"),
    *("<fake_token_around_image><image>Q", "<speech>\nQ", "[VIDEO]Q", "<image_token>Q", "<|image_token|>Q"),
]


@pytest.mark.parametrize("text", FOREIGN)
def test_placeholders_of_other_frameworks_are_refused(text: str) -> None:
    assert _reason(_asked(text, image="a.jpg")) == "unsupported_media"


@pytest.mark.parametrize(("kind", "reason"), [("image/png", "unused_image"), ("video/mp4", "unsupported_media")])
def test_data_urls_inside_a_text_are_refused(kind: str, reason: str) -> None:
    text = f"See ![it](data:{kind};base64,{'A' * 80}) here."
    for raw in (_asked(text), {"image": "a.jpg", "text": text}, {"image": "a.jpg", "question": "Q", "answer": text}):
        assert _reason(raw) == reason
    assert _read(_asked(f"What is data:{kind};base64,AAAA for?")).turns
    # A document may be code.
    assert _read({"text": text}).parts


@pytest.mark.parametrize("answer", ["<|ref|>cat<|/ref|>", "<box>[[1, 2, 3, 4]]</box>", "<loc0001> cat"])
def test_regions_of_other_frameworks_are_refused(answer: str) -> None:
    assert _reason({"image": "a.jpg", "question": "Where?", "answer": answer}) == "unsupported_media"


@pytest.mark.parametrize("text", ["[IMG]http://x.org/a.jpg[/IMG]\nQ", "<speech>\nHello.\n</speech>", "an <img> tag?"])
def test_markup_that_is_closed_stays_text(text: str) -> None:
    assert _read(_asked(text)).turns[0].text == text


MASKS = [
    *(
        {key: True}
        for key in ("no_train", "do_not_train", "skip_training", "excludeFromLoss", "loss_masked", "mask_loss")
    ),
    *({key: 1} for key in ("excluded", "unlearnable", "frozen", "no_grad", "noLoss", "non_trainable")),
    *({key: False} for key in ("trainOnTurn", "isTrainable", "compute_loss", "include_in_loss")),
    *({"lossWeight": 0}, {"loss_multiplier": 0.5}, {"computeLoss": "false"}, {"no_train": "true"}, {"label": b"x"}),
]


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_any_spelling_are_never_overlooked(mask: dict[str, Any]) -> None:
    for raw in ({**TALK, **mask}, {"messages": [ASKS, {**SAYS, **mask}]}):
        assert _reason(raw) == "unsupported_field"


def test_masks_without_effect_are_no_reason() -> None:
    kept = {
        "no_train": False,
        "excluded": None,
        "lossWeight": 1,
        "train_split": "train",
        "label": "no",
        "trainable": True,
    }
    for raw in ({**TALK, **kept}, {"messages": [ASKS, {**SAYS, **kept, "label": None}]}):
        assert all(turn.learned for turn in _read(raw).turns)


@pytest.mark.parametrize(
    "key", ["systemMessage", "system_msg", "system_instructions", "sys", "pre_prompt", "System-Text"]
)
def test_system_prompts_of_any_spelling_are_used(key: str) -> None:
    assert _read({**TALK, key: "Be kind."}).turns[0].text == "Be kind."
    for empty in (None, "", float("nan")):
        assert len(_read({**TALK, key: empty}).turns) == 2


def test_a_system_prompt_beside_text_is_refused() -> None:
    assert _reason({"text": "red", "system": "Be kind."}) == "unsupported_field"


PARTS = [
    [{"image": "a.jpg", "text": None}, {"image": None, "text": "Q"}],
    [{"type": "image", "image": "a.jpg", "image_url": {"url": None}}, {"type": "text", "text": "Q", "image": None}],
    [{"type": "image_url", "image": None, "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "Q", "image": ""}],
    {"type": ["image", "text"], "text": [None, "Q"], "image": ["a.jpg", None]},
]


@pytest.mark.parametrize("content", PARTS)
def test_parts_with_empty_columns_are_read(content: Any) -> None:
    record = _read(_asked(content))
    assert ([picture.name for picture in record.images], record.turns[0].text) == (["a.jpg"], "<image_placeholder>Q")


ROUNDS = [{"user": "Q", "assistant": "A"}, {"user": "R", "assistant": "B"}]


@pytest.mark.parametrize("texts", [json.dumps(ROUNDS), {"user": ["Q", "R"], "assistant": ["A", "B"]}])
def test_rounds_in_any_column_are_read(texts: Any) -> None:
    record = _read({"images": ["a.jpg"], "texts": texts})
    assert [turn.text for turn in record.turns] == ["<image_placeholder>Q", "A", "R", "B"]


def test_documents_in_text_columns_are_read() -> None:
    parts = (Picture(name="a.jpg", optional=True), "red")
    assert _read({"images": '["a.jpg", null]', "texts": '[null, "red"]'}).parts == parts
    info = '[{"image_name": "a.jpg", "matched_text_index": 0}]'
    assert _read({"text_list": '["red"]', "image_info": info}).parts == parts


def test_members_of_an_interleaved_document_keep_their_places() -> None:
    members = tuple(Picture(name=name, data=JPEG) for name in ("k.1.jpg", "k.0.jpg"))
    content = {"images": ["k.0.jpg", None, "k.1.jpg"], "texts": [None, "red", None]}
    raw = {"key": "k", "images": members, "txt": None, "json": json.dumps(content).encode()}
    record = read_record(raw, format="webdataset", columns={})
    assert [part.name if isinstance(part, Picture) else part for part in record.parts] == ["k.0.jpg", "red", "k.1.jpg"]
    assert count_media(raw, columns={})["images"] == 2


@pytest.mark.parametrize("history", ["[]", None, float("nan"), [], '[["P", "B"]]', [("P", "B")]])
def test_histories_of_any_column_are_read(history: Any) -> None:
    record = _read({"query": "Q", "response": "A", "history": history, "input": float("nan")})
    assert [turn.text for turn in record.turns][-2:] == ["Q", "A"]
    assert len(record.turns) == (4 if history and history == history and "P" in str(history) else 2)


def test_turns_of_a_history_are_found_in_rejected_records() -> None:
    raw = {"query": "Q", "response": "A", "history": [["P", "B"]]}
    assert count_media({**raw, "video": "x.mp4"}, columns={})["turns"] == _read(raw).messages == 4


def test_bytes_in_base64_are_an_image() -> None:
    data = base64.b64encode(JPEG).decode()
    for value in ({"bytes": data, "path": None}, {"bytes": data}, {"bytes": data, "path": "a.jpg"}):
        raw = {"image": value, "text": "red"}
        assert [picture.name for picture in _read(raw).pictures] == [data]
        assert count_media(raw, columns={})["images"] == 1


PUBLISHED: list[tuple[int, dict[str, Any]]] = [
    (0, {"text": "T", "dump": "CC", "url": "https://x.org/a", "file_path": "s3://c/x.warc.gz", "language_score": 0.9}),
    (0, {"text": "T", "repo_name": "a/b", "path": "src/img.py", "size": 3, "max_stars_count": 3}),
    (0, {**TALK, "prompt": "Q", "prompt_id": "1", "source": "s", "used_in_training": "yes", "reasoning": "off"}),
    (0, {**TALK, "weight": None, "skip_prompt_formatting": None, "system_prompt": None, "avatarUrl": None}),
    (0, {**TALK, "label": {"ability": ["x"]}, "reward": None, "training_split": "train", "width": 0, "height": 0}),
    (0, {"conversation": [{**ASKS, "redacted": False, "timestamp": None}, SAYS], "header": {"user-agent": "M"}}),
    (1, {"image": "a.jpg", "question": "Q", "answer": "A", "image_id": 5, "question_type": "what"}),
    (1, {"image": "a.jpg", "caption": "c", "url": "https://x/y?z", "width": 3, "height": 3, "similarity": 0.3}),
    (1, {"file_name": "a.jpg", "text": "t", "width": 20, "height": 24}),
    (1, {"images": ["a.jpg"], "texts": ROUNDS, "relevance_ratings": [5], "image_correspondence_ratings": [2]}),
    (1, _asked("<image>Q", images=["a.jpg"], videos=[], audios=[], objects={"ref": [], "bbox": []}, tools=None)),
]


@pytest.mark.parametrize(("images", "raw"), PUBLISHED)
def test_records_of_public_sets_are_read(images: int, raw: dict[str, Any]) -> None:
    assert len(_read(raw).pictures) == images


HOSTILE = [
    _asked([{"type": "image", "index": float("inf")}], images=["a.jpg"]),
    _asked([{"type": "image", "index": 10**400}], images=["a.jpg"]),
    {"images": [], "texts": [{"user": "Q"}]},
    {"query": "Q", "response": "A", "history": 5},
    {"conversations": {1: ["Q"], "value": []}},
    {"images": "{1: 'a.jpg'}", "text": "red"},
]


@pytest.mark.parametrize("raw", HOSTILE)
def test_hostile_values_only_reject_their_record(raw: Any) -> None:
    assert _reason(raw)
