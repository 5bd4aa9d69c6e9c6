"""Formats of documents: plain text, captions, and text interleaved with images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data_tools.readers.record import (
    Picture,
    Record,
    RecordError,
    check_tags,
    mapping,
    picture,
    string,
    unify_tags,
)
from megavl.data.template import IMAGE_TAG


def read_text(raw: Any) -> Record:
    """{`text`}: a document; tags that it spells are ordinary text."""
    text = string(mapping(raw).get("text"), key="text")
    if not text.strip():
        raise RecordError("text is empty", "empty_text")
    return Record(parts=(text,), divisible=True)


def read_caption(raw: Any) -> Record:
    """{`image`, `text`}: the image comes before the text, or where the text has a tag."""
    record = mapping(raw)
    return caption(string(record.get("text"), key="text"), images=(picture(record.get("image"), key="image"),))


def caption(text: str, *, images: tuple[Picture, ...]) -> Record:
    """Text with images at its tags; a single image without a tag comes before the text."""
    text = unify_tags(text)
    if not text.replace(IMAGE_TAG, "").strip():
        raise RecordError("text is empty", "empty_text")
    if IMAGE_TAG not in text and len(images) == 1:
        return Record(parts=(images[0], text))
    check_tags([text], images=len(images))
    parts: list[str | Picture] = []
    for number, words in enumerate(text.split(IMAGE_TAG)):
        parts += [images[number - 1], words] if number else [words]
    return Record(parts=tuple(part for part in parts if part))


def read_obelics(raw: Any) -> Record:
    """{`images`, `texts`}: lists of equal length; at each index one of them is null. A blank line separates texts."""
    record = mapping(raw)
    images, texts = record.get("images"), record.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise RecordError("images and texts must be lists of equal length")
    parts: list[str | Picture] = []
    started = False
    for number, (image, text) in enumerate(zip(images, texts)):
        if (image is None) == (text is None):
            raise RecordError(f"index {number}: exactly one of images and texts must be null")
        if image is not None:
            parts.append(replace(picture(image, key=f"images[{number}]"), optional=True))
        elif string(text, key=f"texts[{number}]").strip():
            parts.append(f"\n\n{text}" if started else text)
            started = True
    return _interleaved(parts)


def read_mmc4(raw: Any) -> Record:
    """{`text_list`, `image_info`}: sentences joined by spaces; each image comes before its matched sentence."""
    record = mapping(raw)
    sentences, infos = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not isinstance(infos, list):
        raise RecordError("text_list and image_info must be lists")
    before: dict[int, list[Picture]] = {}
    for number, info in enumerate(infos):
        index, name = mapping(info).get("matched_text_index"), info.get("image_name")
        if type(index) is not int or not 0 <= index < len(sentences):
            raise RecordError(f"image_info[{number}].matched_text_index must be a number of text_list, found {index!r}")
        if name is None:
            # This data set has a null name where an image could not be fetched.
            found = Picture(name="", optional=True)
        else:
            found = Picture(name=string(name, key=f"image_info[{number}].image_name"), optional=True)
        before.setdefault(index, []).append(found)
    parts: list[str | Picture] = []
    started = False
    for number, sentence in enumerate(sentences):
        text = string(sentence, key=f"text_list[{number}]")
        parts += before.get(number, [])
        if text.strip():
            parts.append(f" {text}" if started else text)
            started = True
    return _interleaved(parts)


def _interleaved(parts: list[str | Picture]) -> Record:
    if not any(isinstance(part, str) for part in parts):
        raise RecordError("text is empty", "empty_text")
    return Record(parts=tuple(parts), divisible=True)
