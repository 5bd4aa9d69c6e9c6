"""Images, videos and audio clips that a record refers to, found by their shape and not by the keys of a format.

The formats read only some keys. What they leave must not vanish: `references` finds everything that looks like a
medium, and `unused` says which of it a reader did not take.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from data_tools.readers.record import IMAGE_KEYS, IMAGE_SUFFIXES, NO_IMAGE, Picture, plain_key, value_in_text
from megavl.data.inline_image import is_base64_image

Kind = Literal["image", "video", "audio"]

# Images that cannot be read are images too.
_OTHER_IMAGES = ("avif", "heic", "heif", "jp2", "jxl", "psd", "ico", "ppm", "pgm", "pbm", "tga", "exr", "dng", "dcm")
VIDEO_SUFFIXES = (
    *(
        "mp4",
        "mpeg4",
        "m4v",
        "mov",
        "mkv",
        "webm",
        "avi",
        "wmv",
        "flv",
        "mpg",
        "mpeg",
        "3gp",
        "ogv",
        "mts",
        "m2ts",
        "vob",
    ),
)
AUDIO_SUFFIXES = (
    *("wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "wma", "aiff", "aif", "amr", "mka", "ape", "wv"),
)
KIND_OF_SUFFIX: Mapping[str, Kind] = {
    **dict.fromkeys((*IMAGE_SUFFIXES, *_OTHER_IMAGES), "image"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys(AUDIO_SUFFIXES, "audio"),
}
_DOCUMENTS = frozenset(
    ("pdf", "djvu", "xps", "epub", "doc", "docx", "ppt", "pptx", "xls", "xlsx", "odt", "odp", "ods", "rtf")
)
DRAWINGS = _DOCUMENTS.union(
    ("svg", "svgz", "eps", "ps", "ai", "emf", "wmf", "cdr", "dxf")
    + ("ply", "pcd", "las", "laz", "obj", "stl", "glb", "gltf", "npy", "npz", "mat", "h5", "nii", "edf")
)
"""File names of drawings, documents, solids and arrays, which a text may as well come from."""
_KIND_OF_WORD: Mapping[str, Kind] = {
    **dict.fromkeys(("image", "img", "picture", "pic", "photo", "pixel"), "image"),
    **dict.fromkeys(("thumbnail", "thumb", "screenshot", "frame"), "image"),
    **dict.fromkeys(("video", "clip"), "video"),
    **dict.fromkeys(("audio", "wave", "waveform", "speech", "sound", "voice", "recording"), "audio"),
    **KIND_OF_SUFFIX,
}
# `image`, `images`, `image_2`, `image_path`, `left_image_urls`; not `image_id`, `image_size`, `num_images`.
_MEDIA_KEY = re.compile(
    r"(?!(?:num|n|has|is|no|with|max|min|total|count)_)(?:[a-z0-9]+_)*?(?P<word>"
    + "|".join(sorted(_KIND_OF_WORD, key=len, reverse=True))
    + r")s?(?:_?\d+)?(?P<as>_?(?:path|file|filename|filepath|file_path|file_name|url|uri|link|byte|b64|base64|data|src"
    r"|source|location|content|raw|array|values))?s?"
)
# Under the first any text is a reference, under the next what names a folder or an address, under the last an address;
# else its shape decides.
_SURE_WORDS = ("image", "img", "pixel", "video", "audio", "waveform")
_LIKELY_WORDS = ("picture", "pic", "photo", "clip", "frame")
_LINKED_WORDS = ("thumbnail", "thumb", "screenshot", "speech", "sound", "voice", "recording")
_DRAWING_KEY = re.compile(
    r"(?:[a-z0-9]+_)*?(?:fig|figure|drawing|diagram|chart|plot|graphic|visual|slide|scan|screenshot|attachment|media"
    r"|files|document|doc|pdf|svg|point_?cloud|pcd|mesh|lidar|scene|depth|feature|signal)s?(?:_?\d+)?(?:_(?:path|file|file_name|filename|url|uri|link|src))?s?"
)
"""Further keys under which the name of a drawing or document is a reference."""
_DOCUMENT_KEY = re.compile(r"(?:[a-z0-9]+_)*(?:pdf|doc|document)_(?:path|file|file_name|filename|url|uri|link|src)")
"""Keys under which a plain text says from which document it was taken."""
_SOURCE_KEYS = {
    *("url", "uri", "path", "paths", "file", "file_name", "filename", "src", "source", "bytes", "data"),
    *("base64", "b64", "image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"),
}
"""Keys inside an image that say where it is."""
_TEXT_KEYS = {
    *("text", "texts", "text_list", "caption", "captions", "value", "content", "question", "answer", "answers"),
    *("user", "assistant", "prompt", "response", "query", "instruction", "input", "output", "completion", "history"),
    *("system", "system_prompt", "title", "description", "alt", "alt_text", "prefix", "suffix", "choices", "options"),
}
"""Keys of what people write: only a data URL in it is a reference."""
_IDENTITY_KEY = re.compile(r"(?:.*_)?(?:id|ids|key|hash|sha256|md5|license|licence|exif)|__\w+__")
_ORIGIN_KEY = re.compile(r"(?:.*_)?(?:urls?|uri|links?|href|sources?|origin|original|provenance|website|page|src)")
"""Keys under which an address says where an image came from."""
_ADDRESS_KEYS = ("image_url", "image_urls", "img_url", "image_link", "original_image_url")
_NAME_KEYS = (
    *("file_name", "file_names", "filename", "filenames", "file", "path", "paths", "name", "names"),
    *("image_path", "image_paths", "image_name", "image_names", "image_file", "img_path"),
)
"""Keys that name an embedded image once more."""
_NAMING_WORDS = {
    *(word.removesuffix("s") for key in (*IMAGE_KEYS, *_NAME_KEYS, *_ADDRESS_KEYS) for word in key.split("_")),
    *(
        "picture",
        "pic",
        "photo",
        "uri",
        "link",
        "href",
        "src",
        "source",
        "location",
        "loc",
        "key",
        "id",
        "base",
        "stem",
    ),
    *("origin", "orig", "local", "ab", "absolute", "rel", "relative", "full", "raw", "basename", "filepath"),
}
"""Words of the keys under which the same image is named once more."""
_ABSENT_KEY = re.compile(r"(?:image|img|picture|photo|video|audio|clip|you_?tube|yt)_?(?:id|name|idx|key|file|path)s?")
_VIDEO_PAGE = re.compile(
    r"https?://(?:(?:www|m|music)\.)?(?:youtube\.com/(?:watch|shorts|embed|v)\b|youtu\.be/|vimeo\.com/\d|bilibili\.com/video)"
)
_PART_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("image", "image_url", "input_image", "image_file", "image_path", "img"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video", "video_file"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio", "audio_file"), "audio"),
}
"""Values of `type` in a part of a message."""
_DATA_URL = re.compile(r"\s*data:(?:(image|video|audio)/|application/pdf)", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:https?|ftp|s3|gs|hf)://", re.IGNORECASE)
_LONGEST_NAME = 2048
# How RIFF, MP4, Matroska, Ogg, FLAC and MP3 begin.
_CLIP_IN_BASE64 = re.compile(r"(?=UklGR|AAAA|GkXfo|T2dnU|ZkxhQ|SUQz)[A-Za-z0-9+/]{40}(?=[A-Za-z0-9+/=\s]*\Z)")
_MAGIC: Sequence[tuple[bytes, int, Kind]] = (
    *((start, 0, "image") for start in (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"%PDF-")),
    *((start, 0, "image") for start in (b"II+\0", b"MM\0+", b"8BPS", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ")),
    *((start, 8, "image") for start in (b"WEBP", b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")),
    *((start, 0, "audio") for start in (b"ID3", b"fLaC", b"OggS", b"#!AMR")),
    *((start, 8, "audio") for start in (b"WAVE", b"AIFF", b"AIFC")),
    *((start, 4, "video") for start in (b"ftyp",)),
    *((start, 8, "video") for start in (b"AVI ",)),
    *((start, 0, "video") for start in (b"\x1aE\xdf\xa3", b"FLV\x01", b"\0\0\x01\xba")),
)


NAME_OF_KIND: Mapping[Kind, str] = {"image": "images", "video": "videos", "audio": "audio"}
"""The word under which a balance counts a kind."""


class Reference(NamedTuple):
    """Something in a record that looks like a medium."""

    kind: Kind
    keys: tuple[str | int, ...]
    """Keys and indices that lead to it."""
    value: Any
    """A path, an address, a data URL, bytes, or {`bytes`, `path`}."""

    @property
    def where(self) -> str:
        """`messages[0].content[1].image`"""
        return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys).lstrip(".") or "record"


def references(value: Any) -> list[Reference]:
    """All media of a parsed record, in its order; empty strings and nulls are none."""
    return list(_found(value, keys=(), kind=None, key=""))


def is_origin(reference: Reference) -> bool:
    """Whether a reference is an address under a key that says where an image came from, not where it is."""
    return is_web_address(reference) and not any(_kind_of_key(key) for key in reference.keys if isinstance(key, str))


def is_web_address(reference: Reference) -> bool:
    """Whether a reference is an address under a key of addresses, as web documents list those of their page."""
    named = [key for key in reference.keys if isinstance(key, str)]
    return bool(_ORIGIN_KEY.fullmatch(_last_key(named)) and _ADDRESS.match(_name_of(reference.value)))


def is_document_of_text(reference: Reference) -> bool:
    """Whether a reference is the document that a plain text was taken from, under a key such as `pdf_path`."""
    document = _end_of_name(_name_of(reference.value)) in _DOCUMENTS
    return document and _DOCUMENT_KEY.fullmatch(_last_key(reference.keys)) is not None


def unused(found: Sequence[Reference], pictures: Sequence[Picture]) -> list[Reference]:
    """The references that no picture of the parsed record stands for.

    What only names a used image once more, or says where it was fetched from, counts as used.
    """
    if not found:
        return []
    names = Counter(picture.name for picture in pictures)
    embedded = [picture for picture in pictures if picture.data is not None]
    left = []
    for reference in found:
        data = _bytes_of(reference.value)
        if data is not None and any(picture.data is data for picture in embedded):
            continue
        name = _name_of(reference.value)
        if data is None and name and names[name] > 0:
            names[name] -= 1
            continue
        left.append(reference)
    if not left or not pictures:
        return left
    # `urls[0]` and `urls[1]` name two images; `meta.url` and `meta.src` may both name one.
    siblings = Counter(_without_indices(reference) for reference in left)
    return [
        reference
        for reference in left
        if siblings[_without_indices(reference)] > len(pictures)
        or not _is_label(reference, pictures, embedded=bool(embedded))
    ]


def absent_medium(record: Mapping[str, Any]) -> str | None:
    """A key of a record without images that names a medium elsewhere, such as `image_id` or a video's page, or None."""
    for key, value in record.items():
        page = isinstance(value, str) and str(key) not in _TEXT_KEYS and _VIDEO_PAGE.match(value)
        if page or (value and _ABSENT_KEY.fullmatch(plain_key(str(key)))):
            return key
    return None


def _is_label(reference: Reference, pictures: Sequence[Picture], *, embedded: bool) -> bool:
    """Whether a reference beside used images is another name of one of them, or its origin."""
    name, key = _name_of(reference.value), _last_key(reference.keys)
    if _bytes_of(reference.value) is not None or not name or _DATA_URL.match(name):
        return False
    if is_origin(reference):
        return True
    if reference.kind != "image":
        return False
    top = len(reference.keys) - sum(isinstance(key, int) for key in reference.keys) == 1
    if top and key in _ADDRESS_KEYS and _ADDRESS.match(name):
        return True
    # `masks/a.jpg` under `mask` is no other name of `a.jpg`.
    naming = all(word.removesuffix("s") in _NAMING_WORDS for word in key.split("_"))
    if naming and any(_ends_alike(picture.name, name) for picture in pictures):
        return True
    return embedded and top and key in _NAME_KEYS


def _without_indices(reference: Reference) -> tuple[str, ...]:
    return tuple(key for key in reference.keys if isinstance(key, str))


def _ends_alike(one: str, other: str) -> bool:
    """Whether one path is the end of the other."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def _found(value: Any, *, keys: tuple[str | int, ...], kind: Kind | None, key: str) -> Iterator[Reference]:
    """References below `value`; `kind` is that of the media key around it, `key` the nearest key."""
    if isinstance(value, Picture):
        yield Reference("image", keys, value)
    elif isinstance(value, Mapping):
        yield from _in_mapping(value, keys=keys, kind=kind)
    elif kind and isinstance(value, list | tuple) and _is_array(value):
        yield Reference(kind, keys, value)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _found(item, keys=(*keys, number), kind=kind, key=key)
    elif isinstance(value, str) and _may_hold_json(value, kind, key=key) and (inner := value_in_text(value)) != value:
        yield from _found(inner, keys=keys, kind=kind, key=key)
    elif isinstance(value, str | bytes) and value:
        found = _kind_of_bytes(value, kind=kind) if isinstance(value, bytes) else _kind_of_text(value, kind, key=key)
        if found:
            yield Reference(found, keys, value)
    elif isinstance(value, int) and value and not isinstance(value, bool) and kind in ("video", "audio"):
        # The number of a clip, which lies elsewhere.
        yield Reference(kind, keys, value)


def _is_array(value: Any) -> bool:
    """Whether a list holds the samples of a medium: fractions, or lists of numbers; whole numbers alone are ids."""
    depth = 0
    while isinstance(value, list | tuple) and value:
        value, depth = value[0], depth + 1
    return (isinstance(value, float) and value == value) or (
        depth > 1 and isinstance(value, int) and not isinstance(value, bool)
    )


def _in_mapping(value: Mapping[str, Any], *, keys: tuple[str | int, ...], kind: Kind | None) -> Iterator[Reference]:
    if value and value.keys() <= {"bytes", "path"}:
        data, path = value.get("bytes"), value.get("path")
        known = (_kind_of_name(path) if isinstance(path, str) else None) or kind
        if isinstance(data, bytes):
            known = _kind_of_bytes(data, kind=known)
        if known and (data or path):
            yield Reference(known, keys, value)
        return
    if "sampling_rate" in value and value.get("array") is not None:
        yield Reference("audio", keys, value)
        return
    part = _PART_KINDS.get(value["type"]) if isinstance(value.get("type"), str) else None
    inner = part or kind
    sized = all(isinstance(side := value.get(name), int | float) and side > 0 for name in ("width", "height"))
    for name, item in ((str(name), item) for name, item in value.items()):
        if part and name in ("type", "text", "detail", "index"):
            continue
        own = _kind_of_key(name)
        if own is None and sized and isinstance(item, str) and _ADDRESS.match(item):
            # What has a size at an address is no page.
            own = "image"
        if own is None and inner and (name in _SOURCE_KEYS or part):
            own = inner
        if inner and own == inner or name in _SOURCE_KEYS:
            # Inside an image, its own keys say where it is.
            yield from _found(item, keys=(*keys, name), kind=own, key="" if own else name)
        else:
            yield from _found(item, keys=(*keys, name), kind=own, key=name)


@lru_cache(maxsize=4096)
def _kind_of_key(name: str) -> Kind | None:
    match = _MEDIA_KEY.fullmatch(plain_key(name))
    if match is None or match["word"] not in _SURE_WORDS or (match["as"] or "").endswith("source"):
        return None
    return _KIND_OF_WORD[match["word"]]


def _may_hold_json(text: str, kind: Kind | None, *, key: str) -> bool:
    """Whether a text may be a list or object that a table without nested columns holds."""
    if text[:1] not in ("[", "{", " ", "\n") or text.lstrip()[:1] not in ("[", "{"):
        return False
    name = plain_key(key)
    return name not in _TEXT_KEYS and (kind is not None or not _IDENTITY_KEY.fullmatch(name))


def _kind_of_text(text: str, kind: Kind | None, *, key: str) -> Kind | None:
    if match := _DATA_URL.match(text):
        return (match[1] or "image").lower()  # type: ignore[return-value]
    name = plain_key(key)
    if name in _TEXT_KEYS or not (text := text.strip()):
        return None
    if kind is None and _IDENTITY_KEY.fullmatch(name):
        return None
    if (found := _kind_of_name(text)) or text.lower() in NO_IMAGE:
        return found
    if kind is None and _end_of_name(text) in DRAWINGS:
        return "image" if _DRAWING_KEY.fullmatch(name) or _MEDIA_KEY.fullmatch(name) else None
    if kind is None and ((linked := _ADDRESS.match(text)) or "/" in text[:_LONGEST_NAME]):
        match = _MEDIA_KEY.fullmatch(name)
        words = (*_LIKELY_WORDS, *_LINKED_WORDS) if linked else _LIKELY_WORDS
        kind = _KIND_OF_WORD[match["word"]] if match and match["word"] in words else None
    return kind or ("image" if is_base64_image(text) else _kind_of_base64(text))


def _kind_of_name(text: str) -> Kind | None:
    """The kind of medium that a path or address of one line names by its end."""
    return KIND_OF_SUFFIX.get(_end_of_name(text))


def _end_of_name(text: str) -> str:
    """What follows the last dot of a path or address of one line, in lower case."""
    if len(text) > _LONGEST_NAME or "\n" in text or "<" in text:
        return ""
    path = text.partition("?")[0].partition("#")[0] if _ADDRESS.match(text) else text
    return path.rpartition(".")[2].lower() if "." in path[1:] else ""


def _kind_of_bytes(data: bytes, *, kind: Kind | None) -> Kind | None:
    return next((found for start, at, found in _MAGIC if data[at : at + len(start)] == start), kind)


def _kind_of_base64(text: str) -> Kind | None:
    """The kind of a clip in base64; its first bytes tell."""
    start = _CLIP_IN_BASE64.match(text)
    return _kind_of_bytes(base64.b64decode(start[0]), kind=None) if start else None


def _bytes_of(value: Any) -> Any:
    if isinstance(value, Picture):
        return value.data
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _name_of(value: Any) -> str:
    if isinstance(value, Picture):
        return value.name
    if isinstance(value, Mapping):
        # Bytes that are text are base64.
        data = value.get("bytes")
        value = data if data and isinstance(data, str) else value.get("path")
    return value if isinstance(value, str) else ""


def _last_key(keys: Sequence[str | int]) -> str:
    return plain_key(next((key for key in reversed(keys) if isinstance(key, str)), ""))
