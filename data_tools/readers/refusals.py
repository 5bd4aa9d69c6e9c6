"""What records say in a way that nothing here can honour: fields that change what is learned, and foreign tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_tools.readers.record import SHORT_TAG, RecordError, plain_key

MASKS = (
    *("loss", "train", "training", "weight", "loss_weight", "loss_scale", "learn", "trainable", "train_on_turn"),
    *("supervised", "is_train", "label"),
)
"""Keys of a turn that say whether its text is learned: ms-swift, Axolotl, OpenAI."""
UNLEARNED = ("masked", "mask", "is_masked", "ignore", "ignore_loss", "skip", "no_loss")
"""Keys of a turn that say the opposite."""
_OPPOSITE = re.compile(
    r"(?:.*_)?(?:no|not|non|never|dont|without)_.*|mask_.*"
    r"|(?:.*_)?(?:masked|skip(?:ped)?|ignored?|excluded?|frozen|un(?:learn|train|super)\w*)(?:_.*)?"
)
"""Keys of masks that mean the opposite: `no_train`, `exclude_from_loss`, `masked_loss`."""
_MASK_LIKE = re.compile(r"(?:.*_)?(?:loss|train|mask|weight|label|learn|supervised)(?:s|ed|ing|able)?(?:_.*)?")
"""Keys that change what is learned where they hold numbers or truth values."""
REFUSED = re.compile(
    r"tools?|functions?|tool_calls?|function_calls?|tool_call_id|(?:rejected|chosen|preferred)(?:_.*)?|kto_tag"
    r"|image_(?:order|index(?:es)?|indices|positions?)|chat_template_kwargs|custom_instructions|developer|preamble|exclude(?:d?|_.*)|frozen"
    r"|no_grad|un(?:learned|learnable|trained|trainable|supervised)|context_only"
)
"""Keys of a record or turn that change what is learned, unless they are empty."""
REFUSED_IN_TURN = re.compile(r"reasoning(?:_content)?|thinking|thought|system(?:_prompt)?|train_detail")
REFUSED_IN_TALK = re.compile(r"history|instructions")
REFUSED_BESIDE_QUESTION = re.compile(
    r"(?:answer_)?choices?(?:_?[a-e0-9])?|options?(?:_?[a-e0-9])?|op[a-e]|[abcde]|candidates|endings|hint|context|passage"
    r"|article|story|document|table|text|caption|middle"
)
REFUSED_BESIDE_TEXT = re.compile(r"question|query|instruction|history|system(?:_prompt)?|image_order")
# Unlike HTML's, this tag has an end: the only place where Qwen-VL's first format names an image.
_FOREIGN_TAG = re.compile(
    r"<(img|video|audio|image)>[^<\n]+</\1>|\(<(?:image|video|audio)>\./</"
    r"|<\|(?:vision_start|vision_end|vision_pad|image_pad|video_pad|audio_pad|image|img|video|audio|image_\d+|video_\d+"
    r"|audio_\d+|audio_bos|audio_eos|image_start|image_end|box_start|object_ref_start|media_\w+|(?:image|im)_(?:token|patch)"
    r"|__dj__\w+|ref|det|grounding)\|>"
    r"|<(?:bbox|ref-object|cls-object|ImageHere|IMG_CONTEXT|start_of_image|image_soft_token|audio_soft_token"
    r"|video_placeholder|audio_placeholder|__dj__(?:image|video|audio)|(?:image|im)_(?:token|patch|pad)|loc\d{4}"
    r"|fake_token_around_image|(?:image|img|video|audio)[ _-]?\d+)>|<ref>[^<\n]*</ref>\s*<box>|<box>\s*[\[(]",
    re.IGNORECASE,
)
_MEDIA_TAG = r"(?i:<image>|<image_placeholder>|<video>|<audio>)"
# A tag that no sentence holds: alone on a line, after a short title, or joined to the start or the end of the text.
LONE_TAG = re.compile(
    rf"(?m:^[ \t]*(?:{_MEDIA_TAG}[ \t]*)+$)|(?m:^\S[^\n:]{{0,20}}:[ \t]*{_MEDIA_TAG}[ \t]*$)"
    rf"|\A\s*{_MEDIA_TAG}(?=\S)|(?<=\S){_MEDIA_TAG}\s*\Z"
)
_CLIP = r"(?:<(?:video|audio|speech|sound|img|pic)>|\[(?:IMG|VIDEO|AUDIO)\])"
_LONE_CLIP = re.compile(rf"(?m:^[ \t]*{_CLIP}[ \t]*$)|\A\s*{_CLIP}(?=\S)|(?<=\S){_CLIP}\s*\Z", re.IGNORECASE)


_INNER_URL = re.compile(r"data:(image|video|audio)/[\w.+-]+(?:;[\w=.-]+)*;base64,\s*[A-Za-z0-9+/]{64}", re.IGNORECASE)
"""A medium in the middle of a text; what only speaks of data URLs shows a few characters of one."""


def refuse_fields(record: Mapping[str, Any], *refused: re.Pattern[str], where: str = "") -> None:
    """Raise RecordError `unsupported_field` at a key that changes what is learned, unless it has no effect."""
    for name, value in record.items():
        plain = plain_key(name) if isinstance(name, str) else ""
        if any(pattern.fullmatch(plain) for pattern in refused):
            neutral = not value or value != value or value in ("[]", "{}", "null", "nan")
        elif _MASK_LIKE.fullmatch(plain) or plain in UNLEARNED:
            neutral = _is_neutral_mask(plain, value)
        else:
            continue
        if not neutral:
            raise RecordError(
                f"{where}{name} changes what is learned and is not supported; remove it, or leave it out with --ignore",
                "unsupported_field",
            )


def _is_neutral_mask(name: str, value: Any) -> bool:
    """Whether a mask or weight leaves all answers learned; a text or an object under such a key is no mask."""
    if isinstance(value, list | tuple):
        return all(_is_neutral_mask(name, item) for item in value)
    opposite = name in UNLEARNED or _OPPOSITE.fullmatch(name) is not None
    if isinstance(value, str):
        said = value.strip().lower()
        if name in ("mask", "loss_mask"):
            return said in ("", "user", "human")
        return name.startswith("label") or said not in (("true", "1", "yes") if opposite else ("false", "0", "no"))
    if value is None or isinstance(value, Mapping) or value != value:
        return True
    if opposite:
        return not value
    # The number of a class, as data sets for classification have it.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is True
    return value == 1 or (name.startswith("label") and value > 1)


def refuse_foreign_tags(text: str, *, key: str, spoken: bool = True) -> None:
    """Raise RecordError at a data URL, or at a tag of another framework for a medium or a region.

    Args:
        text: what is looked at.
        key: where it stands.
        spoken: whether a tag of a clip may stand in it, as in what a user says.

    Raises:
        RecordError: `unused_image` for an image's data URL, else `unsupported_media`.
    """
    if ";base64," in text and (url := _INNER_URL.search(text)):
        reason = "unused_image" if url[1].lower() == "image" else "unsupported_media"
        raise RecordError(f"{key} holds a data URL inside its text; name images under images", reason)
    # Nearly all texts have neither, and the patterns are slow.
    match = _FOREIGN_TAG.search(text) if "<" in text else None
    if spoken and match is None and ("<" in text or "[" in text):
        clip = _LONE_CLIP.search(text)
        # HTML and BBCode close their elements.
        closed = clip and re.search(rf"[<\[]/{clip[0].strip()[1:-1]}[>\]]", text, re.IGNORECASE)
        match = None if closed else clip
    if match:
        raise RecordError(
            f"{key} has the tag {match[0].strip()[:60]!r} of another framework, which stands for a medium or a region; "
            f"spell images as {SHORT_TAG} and name them under images",
            "unsupported_media",
        )
