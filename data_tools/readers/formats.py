"""One function per input format, and the recognition of a format from a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from data_tools.readers.record import Record, RecordError, check_tags, string, strings, unify_tags
from megavl.data.template import IMAGE_TAG, Template, Turn

Role = Literal["system", "user", "assistant"]
_LLAVA_ROLES: Mapping[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
_DEEPSEEK_ROLES: Mapping[str, Role] = {"User": "user", "Assistant": "assistant"}


def read_text(raw: Any) -> Record:
    """{`text`}: a document; tags that it spells are ordinary text."""
    text = string(_mapping(raw).get("text"), key="text")
    if not text.strip():
        raise RecordError("text is empty", "empty_text")
    return Record(text=text, tagged=False)


def read_caption(raw: Any) -> Record:
    """{`image`, `text`}: the image stands before the text, or where the text has a tag."""
    record = _mapping(raw)
    image = string(record.get("image"), key="image")
    text = unify_tags(string(record.get("text"), key="text"))
    if not text.replace(IMAGE_TAG, "").strip():
        raise RecordError("text is empty", "empty_text")
    if IMAGE_TAG not in text:
        text = IMAGE_TAG + text
    check_tags([text], images=1)
    return Record(text=text, images=(image,))


def read_llava(raw: Any) -> Record:
    """{`image` or `images`, `conversations`: [{`from`, `value`}]}; without images it is a text conversation."""
    record = _mapping(raw)
    images: tuple[str, ...] = ()
    if record.get("image") is not None:
        single = record["image"]
        images = strings(single, key="image") if isinstance(single, list) else (string(single, key="image"),)
    elif record.get("images") is not None:
        images = strings(record["images"], key="images")
    turns = []
    for number, message in enumerate(_messages(record.get("conversations"))):
        role = _role(message.get("from"), known=_LLAVA_ROLES, key=f"conversations[{number}].from")
        text = string(message.get("value"), key=f"conversations[{number}].value")
        turns.append(Turn(role=role, text=unify_tags(text)))
    check_tags([turn.text for turn in turns], images=len(images))
    return Record(turns=tuple(turns), images=images)


def read_deepseek(raw: Any) -> Record:
    """Turns {`role`, `content`, `images`}, bare or under `conversations`; images belong to the turn with their tags."""
    messages = _messages(raw if isinstance(raw, list) else _mapping(raw).get("conversations"))
    turns: list[Turn] = []
    images: list[str] = []
    for number, message in enumerate(messages):
        role = _role(message.get("role"), known=_DEEPSEEK_ROLES, key=f"conversations[{number}].role")
        text = unify_tags(string(message.get("content"), key=f"conversations[{number}].content"))
        found = strings(message.get("images") or [], key=f"conversations[{number}].images")
        check_tags([text], images=len(found), where=f"conversations[{number}]: ")
        images += found
        turns.append(Turn(role=role, text=text))
    return Record(turns=tuple(turns), images=tuple(images))


READERS: Mapping[str, Callable[[Any], Record]] = {
    "text": read_text,
    "caption": read_caption,
    "llava": read_llava,
    "deepseek": read_deepseek,
}
"""Rows of `--format`."""

DEFAULT_TEMPLATES: Mapping[str, Template] = {
    "text": "plain",
    "caption": "plain",
    "llava": "deepseek",
    "deepseek": "deepseek",
}
"""Template of each format when none is asked for: documents are supervised whole, conversations by answer."""


def recognise(raw: Any) -> str | None:
    """The format of a parsed record, or None."""
    turns = raw if isinstance(raw, list) else raw.get("conversations") if isinstance(raw, dict) else None
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        return "llava" if "from" in turns[0] else "deepseek" if "role" in turns[0] else None
    if isinstance(raw, dict) and "text" in raw:
        return "caption" if "image" in raw else "text"
    return None


def _mapping(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise RecordError(f"a record is a JSON object, found {type(raw).__name__}")
    return raw


def _messages(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RecordError("conversations must be a list of turns")
    return [_mapping(message) for message in value]


def _role(value: object, *, known: Mapping[str, Role], key: str) -> Role:
    if not isinstance(value, str) or value not in known:
        raise RecordError(f"{key} must be one of {', '.join(known)}, found {value!r}")
    return known[value]
