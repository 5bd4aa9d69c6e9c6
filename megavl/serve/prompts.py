"""Requests of the interface as requests to the model: messages and images to tokens, with every limit checked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from megavl.config.errors import DataError
from megavl.data.image import ImageError, canvas, decode_image
from megavl.data.inline_image import inline_image
from megavl.data.template import IMAGE_TAG, Piece, Turn, encode, inference_prompt
from megavl.foreign.printing import visible
from megavl.generate.decode import Request
from megavl.generate.pretrained import Processor
from megavl.generate.prompt import answer_text
from megavl.generate.stop import StopTexts
from megavl.serve.fields import ChatFields, CompletionFields, Fields, Message, Part
from megavl.serve.limits import CHARACTERS_OF_A_TOKEN, MAX_SCORES, Limits
from megavl.serve.refusal import Refusal, excerpt

_COMPLETION_TOKENS = 16
"""Tokens of a completion that says nothing of its length, as OpenAI has it."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

T = TypeVar("T")


class PromptReader:
    """Makes requests to the model, in threads of its own so that no large prompt or image delays other clients."""

    def __init__(self, processor: Processor, limits: Limits, *, system: str | None = None) -> None:
        """`system` is the system text of chats that bring none; None: the model's."""
        self.processor, self._limits, self._system = processor, limits, processor.system(system)
        # One thread: a tokenizer remembers words, and is not made for several.
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._images = ThreadPoolExecutor(2, thread_name_prefix="images")

    async def chat(self, fields: ChatFields) -> Request:
        """The request of a conversation.

        Raises:
            Refusal: messages, images or sizes that cannot be used.
        """
        ids, urls = await self._in(self._texts, partial(self._conversation, fields.messages), param="messages")
        wanted = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        if wanted == 0:
            raise Refusal(f"{name}: 0 tokens are no answer; give at least 1", param=name)
        room = self._room(len(ids), wanted=wanted, default=self._limits.tokens, param="messages", name=name)
        if fields.alternatives is not None:
            _require_few_scores(room, alternatives=fields.alternatives, advice=f"lower {name}")
        images = await asyncio.gather(
            *(self._in(self._images, partial(self._canvas, url, at), param="messages") for at, url in urls)
        )
        return Request(
            ids=ids,
            images=torch.stack(images) if images else self.processor.read_images([]),
            max_new_tokens=room,
            alternatives=fields.alternatives,
            sampling=fields.sampling(),
            stop=self._stop(fields),
        )

    async def completions(self, fields: CompletionFields) -> list[Request]:
        """One request for each prompt.

        Raises:
            Refusal: prompts or sizes that cannot be used.
        """
        sampling, stop, wanted = fields.sampling(), self._stop(fields), fields.max_tokens
        wanted = _COMPLETION_TOKENS if wanted is None else wanted
        if not wanted and not fields.echo:
            raise Refusal("max_tokens: 0 needs echo: true, because nothing else is asked for", param="max_tokens")
        start = [] if fields.add_special_tokens is False else [Piece(kind="bos")]
        requests = []
        for prompt in fields.prompts:
            if isinstance(prompt, str):
                self._require_short(len(prompt), param="prompt")
                pieces = [*start, Piece(kind="text", text=prompt)]
                ids = await self._in(self._texts, partial(self._ids, pieces), param="prompt")
            else:
                ids = await self._in(self._texts, partial(self._checked, prompt), param="prompt")
            if not ids:
                raise Refusal("prompt: is empty, and this model has no token that begins a text", param="prompt")
            room = self._room(len(ids), wanted=wanted, default=wanted, param="prompt", name="max_tokens")
            requests.append(
                Request(
                    ids=ids,
                    max_new_tokens=room,
                    alternatives=fields.logprobs,
                    score_prompt=bool(fields.echo) and fields.logprobs is not None,
                    sampling=sampling,
                    stop=stop,
                )
            )
        if fields.logprobs is not None:
            tokens = sum(len(one.ids) * one.score_prompt + one.max_new_tokens for one in requests)
            _require_few_scores(tokens, alternatives=fields.logprobs, advice="send fewer prompts")
        return requests

    async def echoes(self, prompts: Sequence[str | list[int]], requests: Sequence[Request]) -> list[str]:
        """The text of each prompt, of which `requests` have the tokens."""

        def read() -> list[str]:
            return [
                prompt if isinstance(prompt, str) else answer_text(asked.ids, tokenizer=self.processor.tokenizer)
                for prompt, asked in zip(prompts, requests, strict=True)
            ]

        return await self._in(self._texts, read, param="prompt")

    def _conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[str, str]]]:
        turns, urls = _turns(messages, most=self._limits.images)
        self._require_short(sum(len(turn.text) for turn in turns), param="messages")
        return self._ids(inference_prompt(turns, system=self._system)), urls

    def _ids(self, pieces: Sequence[Piece]) -> list[int]:
        config = self.processor.config
        encoded = encode(pieces, tokenizer=self.processor.tokenizer, image_tokens=config.image_tokens)
        return [int(token) for token in encoded.ids]

    def _checked(self, ids: Sequence[int]) -> list[int]:
        config = self.processor.config
        if max(ids) >= config.llm.vocab_size:
            raise Refusal(
                f"prompt: the model has no token {max(ids)}, only 0 to {config.llm.vocab_size - 1}", param="prompt"
            )
        if config.image_token_id in ids:
            raise Refusal(
                f"prompt: token {config.image_token_id} stands for an image, which only chat completions have",
                param="prompt",
            )
        return list(ids)

    def _require_short(self, characters: int, *, param: str) -> None:
        most = self._limits.tokens * CHARACTERS_OF_A_TOKEN
        if characters > most:
            raise Refusal(
                f"{param}: {characters} characters cannot fit {self._limits.tokens} tokens; shorten the text",
                param=param,
                code="context_length_exceeded",
            )

    def _room(self, tokens: int, *, wanted: int | None, default: int, param: str, name: str) -> int:
        """Tokens that an answer may have."""
        most = self._limits.tokens
        least = 1 if wanted is None else wanted
        if tokens + least > most:
            raise Refusal(
                f"{param}: {tokens} tokens and {least} after them exceed the limit of {most}; shorten the prompt"
                + (f" or lower {name}" if least > 1 else ""),
                param=param,
                code="context_length_exceeded",
            )
        return min(default, most - tokens) if wanted is None else wanted

    def _stop(self, fields: Fields) -> StopTexts | None:
        if not all(fields.stops):
            raise Refusal("stop: a text to stop at is empty; leave it out", param="stop")
        return StopTexts(fields.stops, self.processor.tokenizer) if fields.stops else None

    def _canvas(self, url: str, location: str) -> torch.Tensor:
        try:
            picture = decode_image(inline_image(url))
            return torch.from_numpy(canvas(picture, geometry=self.processor.config.image_geometry))
        except ImageError as error:
            raise Refusal(f"{location}: {visible(str(error))}", param="messages", code="invalid_image") from None

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], T], *, param: str) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: _refused(work, param=param))


def _refused(work: Callable[[], T], *, param: str) -> T:
    try:
        return work()
    except DataError as error:
        raise Refusal(f"{param}: {visible(str(error))}", param=param) from None


def _require_few_scores(tokens: int, *, alternatives: int, advice: str) -> None:
    scores = tokens * (1 + alternatives)
    if scores > MAX_SCORES:
        raise Refusal(
            f"logprobs: {scores} log-probabilities, at most {MAX_SCORES} are given at once; {advice}", param="logprobs"
        )


def _turns(messages: Sequence[Message], *, most: int) -> tuple[list[Turn], list[tuple[str, str]]]:
    """Turns, and the data URL of each image after its location."""
    turns: list[Turn] = []
    images: list[tuple[str, str]] = []
    given = sum(part.type == "image_url" for one in messages if isinstance(one.content, list) for part in one.content)
    if given > most:
        raise Refusal(f"messages: {given} images, at most {most} are read; leave some out", param="messages")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = _ROLES.get(message.role)
        if role is None:
            raise Refusal(
                f"{where}.role: {excerpt(message.role)!r} is not known; give system, user or assistant",
                param="messages",
            )
        _require_known(message.model_extra, where=where, known=("name", "refusal"))
        text, tags = "", []
        content = message.content or ""
        parts = [Part(type="text", text=content)] if isinstance(content, str) else content
        for index, part in enumerate(parts):
            location = where if isinstance(content, str) else f"{where}.content[{index}]"
            url = _image_of(part, location=location)
            if url is None:
                # Two texts in a row are two paragraphs.
                text += "\n" * bool(index and parts[index - 1].type == "text") + (part.text or "")
                continue
            if role != "user":
                raise Refusal(f"{location}: images belong to the user, not to {message.role}", param="messages")
            images.append((location, url))
            tags.append(text.count(IMAGE_TAG))
            text += IMAGE_TAG
        turns.append(Turn(role=role, text=text, tags=tuple(tags)))  # type: ignore[arg-type]
    return turns, images


def _image_of(part: Part, *, location: str) -> str | None:
    """The data URL of an image; None for a text."""
    _require_known(part.model_extra, where=location, known=("cache_control",))
    if part.type == "text" and part.text is not None:
        return None
    if part.type != "image_url" or part.image_url is None:
        raise Refusal(
            f"{location}.type: {excerpt(part.type)!r} is not understood; give text with its text, or image_url",
            param="messages",
        )
    url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
    if url.lstrip()[:5].lower() != "data:":
        scheme = excerpt(url[:20].partition(":")[0])
        raise Refusal(
            f"{location}.image_url: {scheme}: addresses are not fetched; send the image itself as "
            "data:image/...;base64,...",
            param="messages",
            code="invalid_image_url",
        )
    return url


def _require_known(extra: dict[str, object] | None, *, where: str, known: Sequence[str]) -> None:
    for name, value in (extra or {}).items():
        if name not in known and value is not None and value != []:
            raise Refusal(f"{where}.{excerpt(name)}: is not supported here; leave it out", param="messages")
