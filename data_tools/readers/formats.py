"""The rows of `--format`, and the recognition of a format from a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_tools.readers.conversations import read_deepseek, read_llava, read_messages, record_images
from data_tools.readers.documents import caption, read_caption, read_mmc4, read_obelics, read_text
from data_tools.readers.record import Picture, Record, RecordError, decode, mapping, parse_json, string
from megavl.data.template import Template

Container = Literal["json", "tar", "parquet"]
"""Kind of file: JSONL or a JSON array, tar archive, Parquet."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of `--format`."""

    read: Callable[[Any], Record]
    template: Template
    """Default: documents are supervised as a whole, conversations only in their answers."""
    containers: tuple[Container, ...] = ("json",)


def read_webdataset(raw: Any) -> Record:
    """Members of one key: images with `txt` (a caption), or `json` (a record whose images are the members)."""
    group = mapping(raw)
    images: tuple[Picture, ...] = group["images"]
    key, text = group["key"], group["txt"]
    if text is not None:
        if not images:
            raise RecordError(f"key {key}: has a text but no image", "tar_incomplete")
        # The line end of a text file is not part of the caption.
        return caption(decode(text, name=f"{key}.txt: ").removesuffix("\n").removesuffix("\r"), images=images)
    if group["json"] is None:
        raise RecordError(f"key {key}: has neither .txt nor .json", "tar_incomplete")
    content = parse_json(group["json"], name=f"{key}.json: ")
    if not images:
        return FORMATS[_member_format(content, key=key)].read(content)
    if isinstance(content, dict) and any(content.get(name) is not None for name in ("image", "images")):
        raise RecordError(f"key {key}: its .json names images although the image is a member; remove that field")
    name = _member_format(content, key=key)
    if name == "text":
        return caption(string(content["text"], key="text"), images=images)
    if name == "deepseek":
        return read_deepseek(content, outer=images)
    return FORMATS[name].read({**content, "images": list(images)})


def read_parquet(raw: Any) -> Record:
    """Columns `image` or `images`, with `conversations`, `messages`, `text` or `caption`."""
    row = mapping(raw)
    if row.get("conversations") is not None:
        name = recognise(row)
        if name not in ("llava", "deepseek"):
            raise RecordError("conversations must be a list of turns {from, value} or {role, content}")
        if name == "deepseek":
            return read_deepseek(row, outer=record_images(row))
        return read_llava(row)
    if row.get("messages") is not None:
        return read_messages(row)
    names = [name for name in ("text", "caption") if row.get(name) is not None]
    if len(names) != 1:
        raise RecordError(f"{' and '.join(names) or 'neither text nor caption'} in one row; one of them is the text")
    if "image" not in row and "images" not in row:
        return read_text({"text": row[names[0]]})
    images = record_images(row)
    if not images:
        raise RecordError("the image is null", "image_missing")
    return caption(string(row[names[0]], key=names[0]), images=images)


FORMATS: Mapping[str, Format] = {
    "text": Format(read=read_text, template="plain"),
    "caption": Format(read=read_caption, template="plain"),
    "llava": Format(read=read_llava, template="deepseek"),
    "messages": Format(read=read_messages, template="deepseek"),
    "deepseek": Format(read=read_deepseek, template="deepseek"),
    "webdataset": Format(read=read_webdataset, template="deepseek", containers=("tar",)),
    "parquet": Format(read=read_parquet, template="deepseek", containers=("parquet",)),
    "obelics": Format(read=read_obelics, template="plain", containers=("json", "parquet")),
    "mmc4": Format(read=read_mmc4, template="plain"),
}
"""Rows of `--format`."""


def recognise(raw: Any) -> str | None:
    """The format of a parsed JSON record, or None."""
    turns = raw if isinstance(raw, list) else raw.get("conversations") if isinstance(raw, Mapping) else None
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        return "llava" if "from" in turns[0] else "deepseek" if "role" in turns[0] else None
    if not isinstance(raw, Mapping):
        return None
    if isinstance(raw.get("messages"), list):
        return "messages"
    if isinstance(raw.get("text_list"), list) and "image_info" in raw:
        return "mmc4"
    if isinstance(raw.get("texts"), list) and isinstance(raw.get("images"), list):
        return "obelics"
    if "text" in raw:
        return "caption" if "image" in raw else "text"
    return None


def _member_format(content: Any, *, key: str) -> str:
    name = recognise(content)
    if name not in ("text", "caption", "llava", "messages", "deepseek"):
        raise RecordError(f"key {key}: its .json is no text, caption or conversation")
    return name
