"""The fields of requests: what each may be, which are ignored, and which are refused because they ask for more."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megavl.config.errors import MegaVLError
from megavl.generate.sampling import LEAST_PENALTY, MOST_PENALTY, Sampling
from megavl.serve.limits import MAX_ALTERNATIVES, MAX_MESSAGES, MAX_PARTS, MAX_PROMPTS, MAX_STOPS
from megavl.serve.refusal import Refusal, excerpt, written

_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "request_id", "priority"),
}
"""Fields that change nothing in an answer."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "echo": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
"""Fields that are not supported, with the values that ask for nothing."""

_FORMS = {
    "prompt": f"give a text, or a list of up to {MAX_PROMPTS} texts, or token ids, or a list of lists of them",
    "stop": f"give a text, or a list of up to {MAX_STOPS}",
}
"""Fields of several forms, and how to give them."""

B = TypeVar("B", bound="Fields")
T = TypeVar("T")

_Share = Annotated[float, Field(gt=0, le=1)]
_Alternatives = Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)]
_Tokens = Annotated[int, Field(ge=0)]
# Without fail_fast a list gives an error for each of its items, of which there may be a million.
_Ids = Annotated[list[_Tokens], Field(min_length=1, fail_fast=True)]
_Prompts = Annotated[list[T], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Model):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Ignored: it only pads the pieces."""


class Fields(_Model):
    """What both kinds of requests have."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=MOST_PENALTY)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: _Tokens | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """How tokens are chosen: greedily unless a temperature is given. Without a seed every answer has its own.

        Raises:
            Refusal: a filter without a temperature.
        """
        filters = {"top_p": self.top_p not in (None, 1.0), "top_k": (self.top_k or 0) > 0}
        if self.temperature is None and (given := [name for name, used in filters.items() if used]):
            raise Refusal(
                f"{given[0]}: it has no effect on greedy decoding, the default here; give temperature too",
                param=given[0],
            )
        greedy = not self.temperature
        try:
            return Sampling(
                temperature=self.temperature or 0.0,
                top_p=1.0 if greedy else self.top_p or 1.0,
                top_k=0 if greedy else max(0, self.top_k or 0),
                repetition_penalty=self.repetition_penalty or 1.0,
                seed=secrets.randbelow(2**63) if self.seed is None else self.seed % 2**63,
            )
        except MegaVLError as error:
            raise Refusal(str(error)) from None


class ImageUrl(_Model):
    """Where an image is: in the URL itself."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Ignored: every image is read at the model's own size."""


class Part(_Model):
    """A text or an image of a message."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(_Model):
    """What one side says."""

    role: str
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None


class ChatFields(Fields):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: _Alternatives | None = None

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens at each position; None: no log-probabilities.

        Raises:
            Refusal: alternatives of log-probabilities that are not asked for.
        """
        if self.top_logprobs and not self.logprobs:
            raise Refusal("top_logprobs: needs logprobs: true", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionFields(Fields):
    """A request to `/v1/completions`."""

    prompt: str | _Prompts[str] | _Prompts[_Ids] | _Ids
    echo: bool | None = None
    logprobs: _Alternatives | None = None
    add_special_tokens: bool | None = None
    """Whether BOS stands before a prompt that is a text; default: yes."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, of which there may be one alone."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def read_fields(kind: type[B], body: Any) -> B:
    """Check the body of a request.

    Raises:
        Refusal: naming the first field that is wrong, unknown, or asks for what is not supported.
    """
    if not isinstance(body, dict):
        raise Refusal("the body must be a JSON object")
    content = {name: value for name, value in body.items() if value is not None}
    try:
        fields = kind.model_validate(content)
    except ValidationError as error:
        raise _explained(error) from None
    for name, value in (fields.model_extra or {}).items():
        if name not in _IGNORED and value not in _NEUTRAL.get(name, ()):
            given = excerpt(value) if isinstance(value, str) else written(value)
            raise Refusal(
                f"{excerpt(name)}: {given} is not supported here; leave it out",
                param=name[:100],
                code="unsupported_parameter",
            )
    return fields


def _explained(error: ValidationError) -> Refusal:
    # The one that is deepest inside: of the forms that a field may have, it is that which was meant. So is the form of
    # which only the length is wrong.
    first = max(error.errors(include_url=False), key=lambda one: (len(one["loc"]), one["type"] == "too_long"))
    root = str(first["loc"][0])
    if root in _FORMS and first["loc"][1:]:
        return Refusal(f"{root}: {_FORMS[root]}", param=root, code="invalid_value")
    # Names of forms stand between those of fields.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).islower() and str(part) != "str"]
    name = ".".join(part for part in path if "[" not in part)
    if first["type"] == "missing":
        return Refusal(f"{name}: is missing", param=name, code="missing_required_parameter")
    return Refusal(f"{name}: {first['msg']}, found {written(first['input'])}", param=name, code="invalid_value")
