"""Formats of documents: plain text, captions, and text interleaved with images."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_tools.readers.record import (
    IMAGE_KEYS,
    TAG,
    Picture,
    Record,
    RecordError,
    mapping,
    picture,
    record_images,
    string,
    value_in_text,
)
from data_tools.readers.refusals import LONE_TAG, REFUSED, REFUSED_BESIDE_TEXT, refuse_fields, refuse_foreign_tags

_TAGGED = 1000
"""Characters of a text in which the tag of a missing image is looked for."""
_LEARNED = ("loss", "loss_mask", "train", "rejected", "chosen", "system", "system_prompt")
"""Keys of a document that change what is learned."""
_TALK_KEYS = {"question", "chosen", "rejected", "conversations", "messages"}
_FIRST_TAG = re.compile(rf"\s*(?:{TAG.pattern})[ \t]*\n?")
_LAST_TAG = re.compile(rf"\n[ \t]*(?:{TAG.pattern})\s*")


def read_text(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
    """{`text`}: a document; tags that it spells are ordinary text."""
    record = mapping(raw)
    text = string(record.get("text"), key="text")
    if not text.strip():
        raise RecordError("text is empty", "empty_text")
    if any(key in record for key in IMAGE_KEYS) and LONE_TAG.search(text[:_TAGGED]):
        raise RecordError("an image tag, but no image", "tag_count")
    refuse_fields({key: value for key, value in record.items() if key in _LEARNED}, REFUSED, REFUSED_BESIDE_TEXT)
    return Record(parts=(text,), divisible=True)


def read_caption(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
    """An image with its `text` or `caption`; the image comes before the text.

    Args:
        raw: a parsed record.
        outer: images that come with the record, as the members of a tar archive do.
    """
    record = mapping(raw)
    key, text = _caption_of(record)
    refuse_fields(record, REFUSED, REFUSED_BESIDE_TEXT)
    refuse_foreign_tags(text, key=key)
    if text.lstrip().startswith("{") and _is_talk(text):
        raise RecordError(f"{key} is JSON with turns or answers, which would be learned as text", "unsupported_field")
    images = outer or record_images(record)
    if not images:
        raise RecordError(f"no image beside the {key}; every value of its image is null or empty", "image_missing")
    return caption(text, images=images)


def caption(text: str, *, images: tuple[Picture, ...]) -> Record:
    """Text with images.

    A single image comes before the text, or at a tag that begins or ends it on its own; any other tag is what the text
    says. Of several images each takes one tag.
    """
    if not TAG.sub("", text).strip():
        raise RecordError("text is empty", "empty_text")
    if len(images) == 1:
        if (match := _FIRST_TAG.match(text)) and not TAG.search(text, match.end()):
            return Record(parts=(images[0], text[match.end() :]))
        last = list(_LAST_TAG.finditer(text))
        if len(TAG.findall(text)) == 1 and last and last[0].end() == len(text):
            return Record(parts=(text[: last[0].start()], images[0]))
        return Record(parts=(images[0], text))
    words = TAG.split(text)
    if len(words) - 1 != len(images):
        raise RecordError(f"{len(words) - 1} image tags for {len(images)} images", "tag_count")
    parts: list[str | Picture] = [words[0]]
    for image, following in zip(images, words[1:]):
        parts += [image, following]
    return Record(parts=tuple(part for part in parts if part))


def read_obelics(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
    """{`images`, `texts`}: lists of equal length, at each index at most one not null; a blank line separates texts."""
    record = mapping(raw)
    refuse_fields(record, REFUSED, REFUSED_BESIDE_TEXT)
    images, texts = value_in_text(record.get("images")), value_in_text(record.get("texts"))
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise RecordError("images and texts must be lists of equal length")
    parts: list[str | Picture] = []
    started = False
    for number, (image, text) in enumerate(zip(images, texts)):
        if image is not None and text is not None:
            raise RecordError(f"index {number}: one of images and texts must be null")
        if image is not None:
            parts.append(replace(picture(image, key=f"images[{number}]"), optional=True))
        elif text is not None and string(text, key=f"texts[{number}]").strip():
            parts.append(f"\n\n{text}" if started else text)
            started = True
    return _interleaved(parts)


def read_mmc4(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
    """{`text_list`, `image_info`}: sentences joined by spaces; each image comes before its matched sentence."""
    record = mapping(raw)
    sentences, infos = value_in_text(record.get("text_list")), value_in_text(record.get("image_info"))
    if not isinstance(sentences, list) or not isinstance(infos, list):
        raise RecordError("text_list and image_info must be lists")
    before: dict[int, list[Picture]] = {}
    for number, info in enumerate(infos):
        index, name = mapping(info).get("matched_text_index"), info.get("image_name")
        if isinstance(index, float) and index.is_integer():
            index = int(index)
        if type(index) is not int or not 0 <= index < len(sentences):
            raise RecordError(f"image_info[{number}].matched_text_index must be a number of text_list, found {index!r}")
        # This data set has a null name where an image could not be fetched.
        name = "" if name is None else string(name, key=f"image_info[{number}].image_name")
        before.setdefault(index, []).append(Picture(name=name, optional=True))
    parts: list[str | Picture] = []
    started = False
    for number, sentence in enumerate(sentences):
        text = string(sentence, key=f"text_list[{number}]")
        parts += before.get(number, [])
        if text.strip():
            parts.append(f" {text}" if started else text)
            started = True
    return _interleaved(parts)


def _caption_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """Key and text of a caption."""
    names = [name for name in ("text", "caption") if record.get(name) is not None]
    if len(names) == 2 and record["text"] != record["caption"]:
        raise RecordError("text and caption in one record; name the one to learn with --columns text=...")
    if not names:
        null = [name for name in ("text", "caption") if name in record]
        if null:
            raise RecordError(f"{null[0]} is null", "empty_text")
        raise RecordError("neither text nor caption")
    return names[0], string(record[names[0]], key=names[0])


def _is_talk(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not _TALK_KEYS.isdisjoint(found)


def _interleaved(parts: list[str | Picture]) -> Record:
    if not any(isinstance(part, str) for part in parts):
        raise RecordError("text is empty", "empty_text")
    return Record(parts=tuple(parts), divisible=True)
