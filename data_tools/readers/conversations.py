"""Formats of conversations: turns of user and assistant with images in their text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from data_tools.readers.record import (
    Picture,
    Record,
    RecordError,
    check_tags,
    mapping,
    picture,
    pictures,
    string,
    unify_tags,
)
from megavl.data.template import IMAGE_TAG, Turn

Role = Literal["system", "user", "assistant"]
_LLAVA_ROLES: Mapping[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
_DEEPSEEK_ROLES: Mapping[str, Role] = {"User": "user", "Assistant": "assistant"}
_MESSAGES_ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def read_llava(raw: Any) -> Record:
    """{`image` or `images`, `conversations`: [{`from`, `value`}]}; without images it is a text conversation."""
    record = mapping(raw)
    images = record_images(record)
    turns = []
    for number, message in enumerate(_messages(record.get("conversations"), key="conversations")):
        role = _role(message.get("from"), known=_LLAVA_ROLES, key=f"conversations[{number}].from")
        text = string(message.get("value"), key=f"conversations[{number}].value")
        turns.append(Turn(role=role, text=unify_tags(text)))
    check_tags([turn.text for turn in turns], images=len(images))
    return Record(turns=tuple(turns), images=images)


def read_deepseek(raw: Any, *, outer: tuple[Picture, ...] = ()) -> Record:
    """Turns {`role`, `content`, `images`}, bare or under `conversations`; images belong to the turn with their tags.

    In a turn that names no images, the next ones of `outer`, which come with the record, take the tags.
    """
    turns: list[Turn] = []
    images: list[Picture] = []
    left = list(outer)
    messages = _messages(raw if isinstance(raw, list) else mapping(raw).get("conversations"), key="conversations")
    for number, message in enumerate(messages):
        role = _role(message.get("role"), known=_DEEPSEEK_ROLES, key=f"conversations[{number}].role")
        text = unify_tags(string(message.get("content"), key=f"conversations[{number}].content"))
        found = pictures(message.get("images") or [], key=f"conversations[{number}].images")
        if outer and not found:
            tags = text.count(IMAGE_TAG)
            found, left = tuple(left[:tags]), left[tags:]
        check_tags([text], images=len(found), where=f"conversations[{number}]: ")
        images += found
        turns.append(Turn(role=role, text=text))
    if left:
        check_tags([turn.text for turn in turns], images=len(images) + len(left))
    return Record(turns=tuple(turns), images=tuple(images))


def read_messages(raw: Any) -> Record:
    """{`messages`: [{`role`, `content`}], `images`}: content is a string with tags, or a list of parts.

    Parts are {`type`: `text`, `text`} and {`type`: `image` or `image_url`}, joined without a separator. A tag takes the
    next one of `images`, and so does an image part that names no image. None may be left over.
    """
    record = mapping(raw)
    waiting = iter(record_images(record))
    turns: list[Turn] = []
    images: list[Picture] = []
    for number, message in enumerate(_messages(record.get("messages"), key="messages")):
        where = f"messages[{number}]"
        role = _role(message.get("role"), known=_MESSAGES_ROLES, key=f"{where}.role")
        text = ""
        for part in _parts(message.get("content"), key=f"{where}.content"):
            if isinstance(part, Picture):
                images.append(part)
                text += IMAGE_TAG
                continue
            text += part
            for _ in range(part.count(IMAGE_TAG)):
                images.append(_next(waiting, where=where))
        turns.append(Turn(role=role, text=text))
    if extra := len(list(waiting)):
        raise RecordError(f"{extra} of images have no tag", "tag_count")
    return Record(turns=tuple(turns), images=tuple(images))


def record_images(record: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Images under `image` (one, or a list) or `images`; none when both are absent."""
    single = record.get("image")
    if single is not None:
        return pictures(single, key="image") if isinstance(single, list) else (picture(single, key="image"),)
    return pictures(record["images"], key="images") if record.get("images") is not None else ()


def _parts(content: object, *, key: str) -> Iterator[str | Picture]:
    """Text with unified tags, and images; a part that names no image is a tag."""
    if not isinstance(content, list):
        yield unify_tags(string(content, key=key))
        return
    for number, part in enumerate(content):
        where, part = f"{key}[{number}]", mapping(part)
        kind = part.get("type")
        if kind == "text":
            yield unify_tags(string(part.get("text"), key=f"{where}.text"))
        elif kind == "image":
            named = [part[name] for name in ("image", "path", "url") if part.get(name) is not None]
            if len(named) > 1:
                raise RecordError(f"{where} names {len(named)} images; keep one of image, path, url")
            yield picture(named[0], key=where) if named else IMAGE_TAG
        elif kind == "image_url":
            address = part.get("image_url")
            address = address.get("url") if isinstance(address, Mapping) else address
            yield Picture(name=string(address, key=f"{where}.image_url.url"))
        else:
            raise RecordError(f"{where}.type must be text, image or image_url, found {kind!r}")


def _next(waiting: Iterator[Picture], *, where: str) -> Picture:
    found = next(waiting, None)
    if found is None:
        raise RecordError(f"{where}: more image tags than images", "tag_count")
    return found


def _messages(value: object, *, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{key} must be a list of turns")
    return [mapping(message) for message in value]


def _role(value: object, *, known: Mapping[str, Role], key: str) -> Role:
    if not isinstance(value, str) or value not in known:
        raise RecordError(f"{key} must be one of {', '.join(known)}, found {value!r}")
    return known[value]
