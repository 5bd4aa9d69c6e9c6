"""Conversations of every convention: turns of user and assistant with images in them.

LLaVA, ShareGPT, DeepSeek-VL, OpenAI, ms-swift, Qwen and The Cauldron spell one thing in different ways. One reader
takes them all, so that no convention has a gap that another one does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_tools.readers.record import (
    TAG,
    Picture,
    Record,
    RecordError,
    is_empty,
    mapping,
    picture,
    plain_key,
    record_images,
    string,
    value_in_text,
)
from data_tools.readers.refusals import (
    LONE_TAG,
    MASKS,
    REFUSED,
    REFUSED_BESIDE_QUESTION,
    REFUSED_IN_TALK,
    REFUSED_IN_TURN,
    UNLEARNED,
    refuse_fields,
    refuse_foreign_tags,
)
from megavl.data.template import IMAGE_TAG, Turn

Role = Literal["system", "user", "assistant"]
LISTS = ("conversations", "messages", "conversation")
"""Keys of a list of turns."""
QUESTIONS = (
    *(("question", "answer"), ("question", "answers"), ("query", "response"), ("instruction", "output")),
    *(("prompt", "completion"), ("prompt", "response"), ("question", "response"), ("prompt", "answer")),
    ("prefix", "suffix"),
)
"""Keys of a single question and its answer."""
_QUESTION_KEYS = frozenset(question for question, _ in QUESTIONS)
_LIST_KEYS = frozenset((*LISTS, "prompt", "texts"))
_SYSTEM = re.compile(
    r"sys(?:tem)?(?:_?(?:prompt|message|msg|instruction|text|content)s?)?|meta_?instruction|pre_?prompt|developer_message"
)
"""Keys of a system prompt beside the turns."""
_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user", "prompter", "question", "<|user|>"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "ai", "bot", "chatbot", "bard", "bing", "model", "answer", "<|assistant|>"),
        "assistant",
    ),
}
ROLE_KEYS = ("role", "from")
_TEXT_KEYS = ("content", "value", "text")


@dataclass(frozen=True)
class _Tag:
    """Where an image may stand."""

    spelled: str = ""
    """The text that it is otherwise; empty where it can only be an image."""
    index: int | None = None
    """Number of its image, where the record says so."""


@dataclass(kw_only=True)
class _Message:
    where: str
    role: Role
    parts: list[str | Picture | _Tag]
    learned: bool = True
    images: tuple[Picture, ...] = ()
    """Those that the message itself names beside its text."""

    @property
    def tags(self) -> list[_Tag]:
        return [part for part in self.parts if isinstance(part, _Tag)]


@dataclass(kw_only=True)
class _Conversation:
    messages: list[_Message]
    untagged: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def turn_list(raw: Any) -> tuple[str, list[Any]] | None:
    """Key and turns of a record that is a conversation, or None."""
    if isinstance(raw, list):
        return ("conversations", raw) if raw else None
    if not isinstance(raw, Mapping) or _LIST_KEYS.isdisjoint(raw):
        return None
    lists = [(key, turns) for key in LISTS if (turns := as_list(raw.get(key))) is not None]
    if any(turns != lists[0][1] for _, turns in lists):
        raise RecordError(f"different turns under {' and '.join(key for key, _ in lists)}; keep one of them")
    if lists:
        return lists[0]
    for key in LISTS:
        if isinstance(value := raw.get(key), str) and value.lstrip().startswith(("[{", "[[")):
            raise RecordError(f"{key} is a text that is neither JSON nor a list in Python's notation: {value[:60]!r}")
    prompt, completion = as_list(raw.get("prompt")), as_list(raw.get("completion"))
    if prompt and completion:
        return "prompt", [*prompt, *completion]
    texts = as_list(raw.get("texts"))
    if texts and all(isinstance(text, Mapping) and "user" in text for text in texts):
        return "texts", _rounds_of(texts)
    return None


def question_keys(raw: Any) -> tuple[str, str] | None:
    """The keys of question and answer of a record that is a single round, or None."""
    if not isinstance(raw, Mapping) or _QUESTION_KEYS.isdisjoint(raw):
        return None
    pairs = (pair for pair in QUESTIONS if all(raw.get(key) is not None for key in pair))
    # Beside text, or without an image, these are the parts of code around a gap.
    return next((pair for pair in pairs if pair != ("prefix", "suffix") or record_images(raw)), None)


def read_conversation(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
    """A list of turns, bare or under one of LISTS, with images in the record, in a turn, or in a part of a turn.

    Tags of the user and system take the images in order. A single image without any tag comes first; a tag in a record
    without images is ordinary text, and so is every tag in an answer.

    Args:
        raw: a parsed record.
        outer: images that come with the record, as the members of a tar archive do.
    """
    found = turn_list(raw)
    if found is None or not found[1]:
        raise RecordError("conversations must be a list of turns")
    key, turns = found
    messages = [_message(turn, where=f"{key}[{number}]") for number, turn in enumerate(turns)]
    if isinstance(raw, Mapping):
        refuse_fields(raw, REFUSED, REFUSED_IN_TALK)
    # Its own definition: all images come before the first question.
    return _finish(raw, messages, outer=outer, untagged_many=key == "texts")


def read_question(raw: Any, outer: tuple[Picture, ...] = ()) -> Record:
    """A question and its answer under one of QUESTIONS, with an earlier `history` of pairs, and images."""
    record, pair = mapping(raw), question_keys(raw)
    if pair is None:
        known = ", ".join(" and ".join(pair) for pair in QUESTIONS[:4])
        raise RecordError(f"neither a conversation nor a question with its answer ({known}, ...)")
    refuse_fields(record, REFUSED, REFUSED_BESIDE_QUESTION)
    question, answer = string(record[pair[0]], key=pair[0]), _one_answer(record[pair[1]], key=pair[1])
    if (given := record.get("input")) and given == given:
        if pair != ("instruction", "output"):
            raise RecordError("input changes what is learned and is not supported here; remove it", "unsupported_field")
        question = f"{question}\n{string(record['input'], key='input')}"
    messages: list[_Message] = []
    for number, earlier in enumerate(history(record)):
        where = f"history[{number}]"
        if not isinstance(earlier, list | tuple) or len(earlier) != 2:
            raise RecordError(f"{where} must be a pair of question and answer")
        for role, text in zip(("user", "assistant"), earlier):
            messages.append(_message({"role": role, "content": text}, where=where))
    messages.append(_message({"role": "user", "content": question}, where=pair[0]))
    messages.append(_message({"role": "assistant", "content": answer}, where=pair[1]))
    return _finish(record, messages, outer=outer)


def _finish(raw: Any, messages: list[_Message], *, outer: tuple[Picture, ...], untagged_many: bool = False) -> Record:
    talk = _Conversation(messages=messages)
    if isinstance(raw, Mapping):
        outer = outer or record_images(raw)
        _add_system(raw, talk)
    for message in messages:
        if message.images:
            _place(talk, [message], message.images, where=f"{message.where}: ")
    rest = [message for message in messages if not message.images]
    _place(talk, rest, outer, untagged_many=untagged_many)
    count = len(talk.messages)
    _mend_order(talk)
    images = tuple(part for message in talk.messages for part in message.parts if isinstance(part, Picture))
    return Record(
        turns=tuple(_turn(message) for message in talk.messages),
        images=images,
        messages=count,
        untagged=talk.untagged,
        left_out=talk.left_out,
    )


def _message(raw: Any, *, where: str) -> _Message:
    turn = mapping(raw)
    named = next((key for key in ROLE_KEYS if turn.get(key) is not None), ROLE_KEYS[0])
    value = turn.get(named)
    role = _ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        known = ", ".join(name for name in _ROLES if name.isalpha())
        raise RecordError(
            f"{where}.{named} is {str(value)[:80]!r}, which is none of {known}; if it means one of these, name it with "
            "--columns user=... or assistant=..."
        )
    handled = (*ROLE_KEYS, *_TEXT_KEYS, *MASKS, *UNLEARNED)
    refuse_fields({k: v for k, v in turn.items() if k not in handled}, REFUSED, REFUSED_IN_TURN, where=f"{where}.")
    key = next((key for key in _TEXT_KEYS if turn.get(key) is not None), _TEXT_KEYS[0])
    parts = list(_parts(turn.get(key), role=role, key=f"{where}.{key}"))
    return _Message(
        where=where, role=role, parts=parts, learned=_learned(turn, role, where=where), images=record_images(turn)
    )


def _parts(content: object, *, role: Role, key: str) -> Iterator[str | Picture | _Tag]:
    """Text and images of a turn; tags are found in what users and the system say."""
    if isinstance(content, str) and content.startswith(("[{", "[ {")):
        content = _parts_in_text(content)
    elif isinstance(content, Mapping):
        content = as_list(content) or content
    if not isinstance(content, list):
        yield from _tagged(string(content, key=key), role=role, key=key)
        return
    for number, part in enumerate(content):
        where = f"{key}[{number}]"
        if isinstance(part, str):
            raise RecordError(f"{where} must be an object with a type, found a string")
        part = mapping(part)
        kind = part.get("type")
        if kind is None:
            # DashScope names the kind by the key alone; tables also have the other key, with null.
            kind = next((key for key in ("text", "image") if part.get(key) is not None), None)
        if kind in ("text", "input_text", "output_text"):
            yield from _tagged(string(part.get("text"), key=f"{where}.text"), role=role, key=f"{where}.text")
        elif kind in ("image", "image_url", "input_image"):
            yield _image_part(part, where=where, address=kind != "image")
        elif isinstance(kind, str) and any(word in kind for word in ("video", "audio", "file")):
            raise RecordError(f"{where}.type is {kind}; only text and images can be trained", "unsupported_media")
        else:
            raise RecordError(f"{where}.type must be text, image or image_url, found {kind!r}")


def _parts_in_text(content: str) -> Any:
    """The parts of a turn that a table without nested columns holds as JSON text; another text itself."""
    parts = value_in_text(content)
    known = ("text", "image", "image_url", "input_text", "input_image", "output_text")
    return parts if isinstance(parts, list) and all(_kind_of_part(part) in known for part in parts) else content


def _kind_of_part(part: object) -> object:
    return part.get("type") if isinstance(part, Mapping) and isinstance(part.get("type"), str) else None


def _image_part(part: Mapping[str, Any], *, where: str, address: bool) -> Picture | _Tag:
    named = [name for name in ("image", "path", "url", "image_url", "source", "data") if not is_empty(part.get(name))]
    if len(named) > 1:
        raise RecordError(f"{where} names {len(named)} images; keep one of image, path, url")
    if not named:
        if address:
            raise RecordError(f"{where}.image_url must be a string, found NoneType")
        index = part.get("index") if part.get("index") is not None else part.get("image_index")
        return _Tag(index=_index(index, where=where))
    value = part[named[0]]
    if isinstance(value, Mapping) and "url" in value:
        value = string(value["url"], key=f"{where}.{named[0]}.url")
    elif isinstance(value, Mapping) and value.get("type") == "base64":
        return Picture(name=string(value.get("data"), key=f"{where}.{named[0]}.data"))
    return picture(value, key=f"{where}.{named[0]}")


def _index(value: Any, *, where: str) -> int | None:
    """A whole number; tables turn it into a float where others are null."""
    if value is None or value != value:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0 or str(value) not in (str(number), f"{number}.0"):
        raise RecordError(f"{where}.index is {value!r}; it must be the number of an image", "tag_count")
    return number


def _tagged(text: str, *, role: Role, key: str) -> Iterator[str | _Tag]:
    refuse_foreign_tags(text, key=key, spoken=role != "assistant")
    if role == "assistant":
        yield text
        return
    position = 0
    for match in TAG.finditer(text):
        if match.start() > position:
            yield text[position : match.start()]
        yield _Tag(spelled=match[0])
        position = match.end()
    if position < len(text) or not text:
        yield text[position:]


def _place(
    talk: _Conversation,
    messages: Sequence[_Message],
    images: Sequence[Picture],
    *,
    where: str = "",
    untagged_many: bool = False,
) -> None:
    """Put images at the tags of messages, or turn the tags back into text."""
    tags = [tag for message in messages for tag in message.tags]
    taken = any(isinstance(part, Picture) for message in messages for part in message.parts)
    if not images and all(tag.spelled for tag in tags):
        for message in messages:
            _tags_to_text(message, where=where)
        return
    if (
        not tags
        and taken
        and [part.name for m in messages for part in m.parts if isinstance(part, Picture)]
        == [picture.name for picture in images]
    ):
        # Named twice, in the parts and beside them.
        return
    if not tags and images and not taken and (len(images) == 1 or untagged_many):
        first = next((message for message in messages if message.role == "user"), None)
        drawn = any(m.role == "assistant" and TAG.fullmatch("".join(map(str, m.parts)).strip()) for m in messages)
        if first is not None and not drawn:
            first.parts[:0] = images
            talk.untagged += len(images)
            return
    if len(tags) != len(images):
        raise RecordError(f"{where}{len(tags)} image tags for {len(images)} images", "tag_count")
    order = [number if tag.index is None else tag.index for number, tag in enumerate(tags)]
    if sorted(order) != list(range(len(images))):
        raise RecordError(f"{where}the image parts have the indices {order}, for {len(images)} images", "tag_count")
    waiting = iter(order)
    for message in messages:
        message.parts = [images[next(waiting)] if isinstance(part, _Tag) else part for part in message.parts]


def _tags_to_text(message: _Message, *, where: str) -> None:
    """Turn the tags of a message without images back into text, unless they clearly stand for a missing image."""
    message.parts = [part.spelled if isinstance(part, _Tag) else part for part in message.parts]
    text = "".join(part for part in message.parts if isinstance(part, str))
    if message.role != "assistant" and "<" in text and LONE_TAG.search(text):
        raise RecordError(f"{where}{len(TAG.findall(text))} image tags for 0 images", "tag_count")


def _add_system(record: Mapping[str, Any], talk: _Conversation) -> None:
    """Put a system prompt that stands beside the turns before them."""
    named = (key for key in record if isinstance(key, str) and _SYSTEM.fullmatch(plain_key(key)))
    texts = {string(record[key], key=key) for key in named if not is_empty(record[key])}
    if not texts:
        return
    first = talk.messages[0]
    if first.role == "system":
        texts.add("".join(part for part in first.parts if isinstance(part, str)))
    if len(texts) > 1:
        raise RecordError("two different system prompts; keep one of them")
    if first.role != "system":
        talk.messages.insert(0, _Message(where="system", role="system", parts=list(texts)))


def _mend_order(talk: _Conversation) -> None:
    """Leave out an answer before the first question, and a last question without answer, as LLaVA's loader does."""
    start = int(talk.messages[0].role == "system")
    if len(talk.messages) > start + 1 and talk.messages[start].role == "assistant":
        _leave_out(talk, start, why="leading_answer")
    if len(talk.messages) > start + 1 and talk.messages[-1].role == "user":
        _leave_out(talk, len(talk.messages) - 1, why="unanswered")


def _leave_out(talk: _Conversation, index: int, *, why: str) -> None:
    message = talk.messages.pop(index)
    if any(isinstance(part, Picture) for part in message.parts):
        what = "an answer before any question" if why == "leading_answer" else "a question without an answer"
        raise RecordError(f"{message.where} is {what} and would be left out, but holds an image", "turns")
    talk.left_out[why] = talk.left_out.get(why, 0) + 1


def _turn(message: _Message) -> Turn:
    """Join the parts; where the text spells the tag itself, say which tags are images."""
    texts: list[str] = []
    tags: list[int] = []
    seen = 0
    for part in message.parts:
        if isinstance(part, Picture):
            tags.append(seen)
            texts.append(IMAGE_TAG)
            seen += 1
        else:
            assert isinstance(part, str)
            texts.append(part)
            seen += part.count(IMAGE_TAG)
    all_images = len(tags) == seen
    text = "".join(texts)
    return Turn(role=message.role, text=text, tags=None if all_images else tuple(tags), learned=message.learned)


def _learned(turn: Mapping[str, Any], role: Role, *, where: str) -> bool:
    """Whether an answer is supervised, by the key with which its origin says so."""
    for key in (*MASKS, *UNLEARNED):
        value = turn.get(key)
        if value is None or (isinstance(value, str) and key == "label"):
            continue
        if value not in (0, 1) or isinstance(value, str):
            raise RecordError(f"{where}.{key} is {value!r}; only 0 and 1 are supported", "unsupported_field")
        value = bool(value) != (key in UNLEARNED)
        if value and role != "assistant" and key not in ("weight", *UNLEARNED):
            raise RecordError(f"{where}.{key} asks to learn what the {role} says", "unsupported_field")
        if not value:
            return False
    return True


def history(record: Mapping[str, Any]) -> Sequence[Any]:
    """Earlier pairs of question and answer, as a list or as the text of one."""
    pairs = value_in_text(record.get("history"))
    return () if is_empty(pairs) else pairs if isinstance(pairs, list) else (pairs,)


def _one_answer(value: Any, *, key: str) -> str:
    if isinstance(value, list) and value and all(isinstance(item, str) and item == value[0] for item in value):
        return str(value[0])
    if isinstance(value, list):
        raise RecordError(f"{key} holds {len(value)} answers; name the one to learn with --columns answer=...")
    return string(value, key=key)


def as_list(value: Any) -> list[Any] | None:
    """Turns from a list, from a struct of lists as tables hold them, or from a text with these; None if none."""
    value = value_in_text(value)
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise RecordError(f"the lists under {', '.join(map(str, value))} have different lengths")
        value = [dict(zip(value, row)) for row in zip(*value.values())]
    return value if isinstance(value, list) and value else None


def _rounds_of(texts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns of The Cauldron: [{`user`, `assistant`}]."""
    roles = ("user", "assistant")
    rounds = []
    for text in texts:
        other = {key: value for key, value in text.items() if key not in roles}
        rounds += [
            {"role": "user", "content": text.get("user")},
            {**other, "role": "assistant", "content": text.get("assistant")},
        ]
    return rounds
