"""The rows of `--format`, and the recognition of a format from a record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from data_tools.readers.conversations import (
    LISTS,
    ROLE_KEYS,
    as_list,
    history,
    question_keys,
    read_conversation,
    read_question,
    turn_list,
)
from data_tools.readers.documents import caption, read_caption, read_mmc4, read_obelics, read_text
from data_tools.readers.record import (
    IMAGE_KEYS,
    Picture,
    Record,
    RecordError,
    decode,
    is_empty,
    mapping,
    parse_json,
    record_images,
    value_in_text,
)
from data_tools.readers.references import (
    NAME_OF_KIND,
    Reference,
    absent_medium,
    is_document_of_text,
    is_origin,
    is_web_address,
    references,
    unused,
)
from megavl.data.template import Template

Container = Literal["json", "tar", "parquet"]
"""Kind of file: JSONL or a JSON array, tar archive, Parquet."""


_WEB_KEYS = frozenset(("texts", "text_list"))
"""Keys of interleaved documents."""
COLUMN_NAMES = (
    *("image", "images", "text", "caption", "question", "answer", "conversations", "messages", "system"),
    *("role", "content", "user", "assistant"),
)
"""Names that `--columns` can give to other keys of a record or of its turns, or to other values of their roles."""


class _Reader(Protocol):
    def __call__(self, raw: Any, outer: tuple[Picture, ...] = ()) -> Record: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of `--format`."""

    read: _Reader
    template: Template
    """Default: documents are supervised as a whole, conversations only in their answers."""
    containers: tuple[Container, ...] = ("json", "parquet")


def read_any(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
    """A record in the format that it has by itself; `outer` are images that come with it."""
    name = recognise(raw, images=bool(outer))
    if name is None:
        seen = f"keys {', '.join(map(str, list(raw)[:12]))}" if isinstance(raw, Mapping) else f"a {type(raw).__name__}"
        raise RecordError(f"of no known format ({seen}); keys that are called otherwise are named by --columns")
    return FORMATS[name].read(raw, outer=outer)


def read_webdataset(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
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
    try:
        return read_any(*_named_members(_record_of(group), images))
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


def read_record(raw: Any, *, format: str | None, columns: Mapping[str, str], ignore: Collection[str] = ()) -> Record:
    """Read a parsed record, and refuse it where a medium would be left out.

    Args:
        raw: a JSON value, the columns of a row, or the members of a key.
        format: row of FORMATS; None: what each record has by itself.
        columns: other names of keys, by the name that the formats use.
        ignore: keys that the user leaves out.

    Raises:
        RecordError: the record cannot be used; `unused_image` and `unsupported_media` where it holds something that its
            format does not read.
    """
    try:
        return _read_checked(_prepared(raw, columns, ignore), format=format)
    except RecursionError as error:
        raise RecordError("nested too deeply", "json") from error


def count_media(raw: Any, *, columns: Mapping[str, str], ignore: Collection[str] = ()) -> dict[str, int]:
    """Images, videos, audio clips and turns of a parsed record, whatever its format."""
    counts = dict.fromkeys((*NAME_OF_KIND.values(), "turns"), 0)
    try:
        content, outer = _content(_prepared(raw, columns, ignore))
        found = references(content)
        named = [reference for reference in found if not is_origin(reference)]
        # An address beside its image is no other image.
        for reference in named if outer or named else found:
            counts[NAME_OF_KIND[reference.kind]] += 1
        counts["images"] += len(outer)
        turns = turn_list(content)
        counts["turns"] = len(turns[1]) if turns else 0
        if turns is None and question_keys(content):
            counts["turns"] = 2 * (1 + len(history(content)))
    except (RecordError, RecursionError):
        # The record is rejected for what was raised; what was counted until then stands.
        pass
    return counts


def count_ignored(raw: Any, *, columns: Mapping[str, str], ignore: Collection[str]) -> dict[str, int]:
    """Images, videos and audio clips under keys that the user leaves out."""
    if not ignore:
        return {}
    whole, kept = count_media(raw, columns=columns), count_media(raw, columns=columns, ignore=ignore)
    return {kind: whole[kind] - kept[kind] for kind in NAME_OF_KIND.values()}


def renamed(raw: Any, columns: Mapping[str, str]) -> Any:
    """A record, and its turns, under the names that the formats use.

    Raises:
        RecordError: a record has an image under its usual name too.
    """
    if not columns:
        return raw
    if not isinstance(raw, Mapping):
        return [renamed(turn, columns) for turn in raw] if isinstance(raw, list) else raw
    content = dict(raw)
    for name, column in columns.items():
        if column in raw:
            if name in IMAGE_KEYS and raw.get(name) is not None and name not in columns.values():
                raise RecordError(f"has {name} beside {column}, which --columns names {name}; keep one of them")
            content[name] = raw[column]
            if column not in columns:
                del content[column]
    roles = {columns[role].lower(): role for role in ("system", "user", "assistant") if role in columns}
    for key in ROLE_KEYS:
        if roles and isinstance(said := content.get(key), str):
            content[key] = roles.get(said.strip().lower(), said)
    for key, value in content.items():
        turns = as_list(value) if key in LISTS or isinstance(value, list) else None
        if turns and any(isinstance(turn, Mapping) for turn in turns):
            content[key] = [renamed(turn, columns) for turn in turns]
    return content


def _prepared(raw: Any, columns: Mapping[str, str], ignore: Collection[str]) -> Any:
    """A record as the formats read it: under their names, and without the keys that the user leaves out."""
    if not columns and not ignore:
        return raw
    if not _is_group(raw):
        return _without(renamed(raw, columns), ignore)
    try:
        record = parse_json(raw["json"]) if raw["json"] is not None else None
    except RecordError:
        # Told when it is read.
        return raw
    return {**raw, "json": _without(renamed(record, columns), ignore)} if record else raw


def _without(raw: Any, ignore: Collection[str]) -> Any:
    """A record, at every depth, without the keys that the user leaves out."""
    if not ignore:
        return raw
    if isinstance(raw, Mapping):
        return {key: _without(value, ignore) for key, value in raw.items() if key not in ignore}
    return [_without(item, ignore) for item in raw] if isinstance(raw, list) else raw


def _read_checked(raw: Any, *, format: str | None) -> Record:
    content, _ = _content(raw)
    found = references(content)
    images = [reference for reference in found if reference.kind == "image"]
    # Beside images a video may be named as their origin.
    other = [reference for reference in found if reference.kind != "image"]
    if other and (other := unused(other, record_images(content) if isinstance(content, Mapping) else ())):
        raise _refusal(
            other[0], "unsupported_media", "only text and images are trained; leave it out with --ignore KEY"
        )
    try:
        record = FORMATS[format].read(raw) if format else read_any(raw)
    except RecordError as error:
        # The image that is missing may stand under a key that no format reads.
        others = [reference for reference in images if error.reason == "image_missing" and not is_origin(reference)]
        raise (_unused_image(others[0]) if others else error) from None
    # Web documents also list addresses of their page, some of images that they do not hold.
    if record.divisible and isinstance(content, Mapping) and not _WEB_KEYS.isdisjoint(content):
        images = [reference for reference in images if not is_web_address(reference)]
    if record.divisible and not record.pictures:
        images = [reference for reference in images if not is_document_of_text(reference)]
    if left := unused(images, record.pictures):
        raise _unused_image(left[0])
    if record.pictures or not isinstance(content, Mapping):
        return record
    if record.turns and (key := absent_medium(content)):
        raise RecordError(f"{key} ({content[key]!r}) names a medium that the record does not hold", "image_missing")
    return replace(record, image_empty=True) if any(key in content for key in IMAGE_KEYS) else record


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
    if "image_info" in raw and isinstance(value_in_text(raw.get("text_list")), list):
        return "mmc4"
    if "texts" in raw and all(isinstance(value_in_text(raw.get(key)), list) for key in ("texts", "images")):
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
    if not _is_group(raw):
        return raw, ()
    try:
        return _named_members(_record_of(raw), raw["images"])
    except RecordError:
        return {}, raw["images"]


def _is_group(raw: Any) -> bool:
    """Whether these are the members of a key in a tar archive."""
    return isinstance(raw, Mapping) and isinstance(raw.get("images"), tuple)


def _record_of(group: Mapping[str, Any]) -> Any:
    """The record of a key, parsed or not; an empty one where it has none."""
    content = group["json"]
    return parse_json(content) if isinstance(content, bytes) else {} if content is None else content


def _named_members(content: Any, members: tuple[Picture, ...]) -> tuple[Any, tuple[Picture, ...]]:
    """A record beside its images, which it may name; the images in the order of their names."""
    named = record_images(content) if isinstance(content, Mapping) and members else ()
    if not named:
        return content, members
    found = [next((member for member in members if _is_named(member.name, picture.name)), None) for picture in named]
    if len(named) == len(members) == 1 and named[0].data is None:
        found = [members[0]]
    if None in found or len({id(member) for member in found}) != len(members):
        return content, members
    if recognise(content) == "obelics" and "image" not in content:
        # Their indices say where the images of an interleaved document stand.
        taken = iter(found)
        names = value_in_text(content["images"])
        return {**content, "images": [None if is_empty(name) else next(taken, None) for name in names]}, ()
    return {key: value for key, value in content.items() if key not in IMAGE_KEYS}, tuple(filter(None, found))


def _is_named(member: str, name: str) -> bool:
    """Whether `00/k.1.jpg` is called `k.1.jpg`, `1.jpg` or `jpg/00/k.1.jpg`."""
    file = member.rpartition("/")[2]
    return file == name.rpartition("/")[2] or file.partition(".")[2] == name


def _unused_image(reference: Reference) -> RecordError:
    remedy = "no format reads it there; name its key with --columns image=..., or leave it out with --ignore KEY"
    return _refusal(reference, "unused_image", remedy)


def _refusal(reference: Reference, reason: str, remedy: str) -> RecordError:
    shown = reference.value if isinstance(reference.value, str) else type(reference.value).__name__
    what = "an image" if reference.kind == "image" else f"{reference.kind}"
    where = f"{reference.where} ({str(shown)[:80]!r})"
    return RecordError(f"{where} looks like {what} and is not used: {remedy}", reason)
