"""The rows of `--format`, and the recognition of a format from a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from data_tools.readers.conversations import question_keys, read_conversation, read_question, turn_list
from data_tools.readers.documents import caption, read_caption, read_mmc4, read_obelics, read_text
from data_tools.readers.record import Picture, Record, RecordError, decode, mapping, parse_json, record_images
from data_tools.readers.references import Reference, is_origin, references, unused
from megavl.data.template import Template

Container = Literal["json", "tar", "parquet"]
"""Kind of file: JSONL or a JSON array, tar archive, Parquet."""


COLUMN_NAMES = (
    *("image", "images", "text", "caption", "question", "answer", "conversations", "messages", "system"),
    *("role", "content"),
)
"""Names that `--columns` can give to other keys of a record, or of its turns."""


class _Reader(Protocol):
    def __call__(self, raw: Any, *, outer: tuple[Picture, ...] = ()) -> Record: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of `--format`."""

    read: _Reader
    template: Template
    """Default: documents are supervised as a whole, conversations only in their answers."""
    containers: tuple[Container, ...] = ("json", "parquet")


def read_any(raw: Any, *, outer: tuple[Picture, ...] = ()) -> Record:
    """A record in the format that it has by itself."""
    name = recognise(raw, images=bool(outer))
    if name is None:
        seen = f"keys {', '.join(map(str, list(raw)[:12]))}" if isinstance(raw, Mapping) else f"a {type(raw).__name__}"
        raise RecordError(f"of no known format ({seen}); keys that are called otherwise are named by --columns")
    return FORMATS[name].read(raw, outer=outer)


def read_webdataset(raw: Any, *, outer: tuple[Picture, ...] = ()) -> Record:
    """Members of one key: images with `txt` (a caption), or `json` (a record whose images are the members)."""
    group = mapping(raw)
    images: tuple[Picture, ...] = group["images"]
    key, text = group["key"], group["txt"]
    if text is not None:
        if not images:
            raise RecordError(f"key {key}: has a text but no image", "tar_incomplete")
        if turn_list(_content(raw)[0]):
            raise RecordError(f"key {key}: has a .txt and a conversation in its .json; keep one of them")
        # The line end of a text file is not part of the caption.
        return caption(decode(text, name=f"{key}.txt: ").removesuffix("\n").removesuffix("\r"), images=images)
    if group["json"] is None:
        raise RecordError(f"key {key}: has neither .txt nor .json", "tar_incomplete")
    content = parse_json(group["json"], name=f"{key}.json: ")
    try:
        return read_any(content, outer=images)
    except RecordError as error:
        raise RecordError(f"key {key}: {error}", error.reason) from error


FORMATS: Mapping[str, Format] = {
    "text": Format(read=read_text, template="plain"),
    "caption": Format(read=read_caption, template="plain"),
    "llava": Format(read=read_conversation, template="deepseek"),
    "messages": Format(read=read_conversation, template="deepseek"),
    "deepseek": Format(read=read_conversation, template="deepseek"),
    "cauldron": Format(read=read_conversation, template="deepseek"),
    "question": Format(read=read_question, template="deepseek"),
    "webdataset": Format(read=read_webdataset, template="deepseek", containers=("tar",)),
    "parquet": Format(read=read_any, template="deepseek", containers=("parquet",)),
    "obelics": Format(read=read_obelics, template="plain"),
    "mmc4": Format(read=read_mmc4, template="plain"),
}
"""Rows of `--format`."""


def read_record(raw: Any, *, format: str | None, columns: Mapping[str, str]) -> Record:
    """Read a parsed record, and refuse it where a medium would be left out.

    Args:
        raw: a JSON value, the columns of a row, or the members of a key.
        format: row of FORMATS; None: what each record has by itself.
        columns: other names of keys, by the name that the formats use.

    Raises:
        RecordError: the record cannot be used; `unused_image` and `unsupported_media` where it holds something that its
            format does not read.
    """
    raw = renamed(raw, columns)
    content, outer = _content(raw)
    found = references(content)
    if other := [reference for reference in found if reference.kind != "image"]:
        # Beside images a video may be named as their origin.
        other = unused(other, record_images(content) if isinstance(content, Mapping) else ())
        if other:
            raise _refusal(other[0], "unsupported_media", "only text and images are trained; remove it or the record")
    images = [reference for reference in found if reference.kind == "image"]
    try:
        record = (FORMATS[format].read if format else read_any)(raw)
    except RecordError as error:
        # The image that is missing may stand under a key that no format reads.
        others = [reference for reference in images if error.reason == "image_missing" and not is_origin(reference)]
        raise (_unused_image(others[0]) if others else error) from None
    left = unused(images, record.pictures)
    if left:
        raise _unused_image(left[0])
    return record


def count_media(raw: Any, *, columns: Mapping[str, str]) -> dict[str, int]:
    """Images, videos, audio clips and turns of a parsed record, whatever its format."""
    content, outer = _content(renamed(raw, columns))
    counts = {"images": len(outer), "videos": 0, "audio": 0, "turns": 0}
    for reference in references(content):
        counts[{"image": "images", "video": "videos", "audio": "audio"}[reference.kind]] += 1
    try:
        turns = turn_list(content)
    except RecordError:
        turns = None
    counts["turns"] = len(turns[1]) if turns else 2 * (question_keys(content) is not None)
    return counts


def renamed(raw: Any, columns: Mapping[str, str]) -> Any:
    """A record, and its turns, under the names that the formats use."""
    if not columns or not isinstance(raw, Mapping):
        return raw
    taken = set(columns.values())
    content = {key: value for key, value in raw.items() if key not in taken and key not in columns}
    content |= {name: raw[column] for name, column in columns.items() if column in raw}
    for key, value in content.items():
        if isinstance(value, list) and any(isinstance(turn, Mapping) for turn in value):
            content[key] = [renamed(turn, columns) for turn in value]
    return content


def recognise(raw: Any, *, images: bool = False) -> str | None:
    """The format of a parsed JSON record, or None; `images` says whether images come with it."""
    found = turn_list(raw)
    if found is not None:
        key, turns = found
        if key == "texts":
            return "cauldron"
        if not isinstance(turns[0], Mapping):
            return None
        if key != "conversations":
            return "messages"
        return "llava" if "from" in turns[0] else "deepseek" if "role" in turns[0] else None
    if not isinstance(raw, Mapping):
        return None
    if isinstance(raw.get("messages"), list):
        return "messages"
    if isinstance(raw.get("text_list"), list) and "image_info" in raw:
        return "mmc4"
    if isinstance(raw.get("texts"), list) and isinstance(raw.get("images"), list):
        return "obelics"
    if question_keys(raw):
        return "question"
    if "text" in raw or "caption" in raw:
        if images or record_images(raw) or "text" not in raw:
            return "caption"
        return "text"
    return None


def _content(raw: Any) -> tuple[Any, tuple[Picture, ...]]:
    """What a record says, and the images that come with it."""
    if not (isinstance(raw, Mapping) and isinstance(raw.get("images"), tuple)):
        return raw, ()
    # The members of a key in a tar archive.
    if raw["json"] is None:
        return {}, raw["images"]
    try:
        return parse_json(raw["json"]), raw["images"]
    except RecordError:
        return {}, raw["images"]


def _unused_image(reference: Reference) -> RecordError:
    remedy = "no format reads it there; name its key with --columns image=..., or remove it"
    return _refusal(reference, "unused_image", remedy)


def _refusal(reference: Reference, reason: str, remedy: str) -> RecordError:
    shown = reference.value if isinstance(reference.value, str) else type(reference.value).__name__
    what = "an image" if reference.kind == "image" else f"{reference.kind}"
    where = f"{reference.where} ({str(shown)[:80]!r})"
    return RecordError(f"{where} looks like {what} and is not used: {remedy}", reason)
