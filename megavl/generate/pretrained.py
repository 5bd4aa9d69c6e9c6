"""MegaVL as a library: a model opened from disk, prompts for it, and its answers.

    from megavl.generate.pretrained import Model

    model = Model.load("runs/demo/hf_native")
    inputs = model.processor("<image_placeholder>What is this?", images=["photo.png"])
    print(model.generate(inputs, max_new_tokens=64).text)

Legend: I images, C canvas side in pixels.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megavl.config.releases  # noqa: F401  # before megatron-core
from megavl.config.errors import DataError, NumericsError, UsageError
from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig
from megavl.data.template import Piece, Template, Turn, inference_prompt
from megavl.data.tokenizer import Tokenizer
from megavl.generate.decode import Request, generate
from megavl.generate.open_model import check_layout, check_world, find_model_on_every_rank, load_stage
from megavl.generate.prompt import (
    ImageSource,
    answer_text,
    encode_prompt,
    end_ids,
    prompt_pieces,
    read_canvases,
    require_room,
    with_image_tags,
)
from megavl.generate.sampling import Sampling
from megavl.generate.score import ROW_TOKENS, Score, score
from megavl.generate.score_inputs import encode_options, text_windows
from megavl.generate.score_rows import ScoreRequest
from megavl.generate.stop import StopTexts
from megavl.generate.stream import TextStream
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import groups

Message = Mapping[str, Any]
"""`{"role": "user" | "assistant" | "system", "content": text, "images": [...]}`; images may be left out."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A prompt as the model reads it."""

    ids: tuple[int, ...]
    images: torch.Tensor
    """uint8 (I, 3, C, C) in the order of their positions."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    """With the end-of-sentence token, when the model gave it."""
    text: str
    """Exactly the decoded tokens, up to a stop text; an answer in the chat format begins with a space."""


class Processor:
    """Prompts and images to `Inputs`, by the rules of the released processor."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.end_ids = end_ids(config, tokenizer=tokenizer)

    def __call__(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        *,
        system: str | None = None,
        template: Template = "deepseek",
    ) -> Inputs:
        """Prepare a prompt that waits for the model's answer.

        Args:
            prompt: one question, or the messages of a conversation that ends with the user's. An empty message of the
                assistant may follow. Each `<image_placeholder>` stands for an image; without any, images come first.
            images: files, or images in memory, of one question; messages bring their own.
            system: system text of the chat format, unless the conversation has one; empty for none, None for
                the model's.
            template: see `prompt_pieces`; a conversation has the chat format.

        Raises:
            DataError: image tags and images differ in number, roles do not alternate, the prompt is too long, or an
                image cannot be read.
        """
        if isinstance(prompt, str):
            text = self.system(system)
            pieces = prompt_pieces(prompt, images=len(images), template=template, system=text)
        else:
            if images or template != "deepseek":
                raise UsageError("a conversation brings its images in its messages, and its template is deepseek")
            turns, images = _turns(prompt)
            pieces = inference_prompt(turns, system=self.system(system))
        ids = self.encode(pieces)
        return Inputs(ids=tuple(ids), images=self.read_images(images))

    def system(self, given: str | None) -> str:
        """The system text that is given, or else the model's own."""
        return self.config.system_prompt if given is None else given

    def encode(self, pieces: Sequence[Piece], *, room: int = 1) -> list[int]:
        """Token ids of a prompt with `room` tokens left for an answer; see `encode_prompt`."""
        return encode_prompt(pieces, tokenizer=self.tokenizer, config=self.config, room=room)

    def read_images(self, images: Sequence[ImageSource]) -> torch.Tensor:
        """Canvases uint8 (I, 3, C, C); see `read_canvases`."""
        return read_canvases(images, geometry=self.config.image_geometry)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return answer_text(ids, tokenizer=self.tokenizer)


class Model:
    """A model that answers, on one process or on the ranks of a launcher.

    On several ranks every one of them makes the same calls and gets the same results.
    """

    def __init__(self, stage: DeepseekVL, processor: Processor) -> None:
        """Wrap this rank's stage, in eval mode; `Model.load` opens one from disk."""
        self.stage, self.processor = stage, processor

    @classmethod
    def load(cls, path: str | Path, *, dtype: str | None = None, parallel: ParallelConfig | None = None) -> Model:
        """Open a checkpoint, the newest of a directory of them, or a Hugging Face folder in either format.

        Process groups start with the first model and end with the process. CUDA is used where PyTorch finds it; hide
        it with `CUDA_VISIBLE_DEVICES=` to stay on the CPU, where megatron-core's CUDA names are then redirected.

        Args:
            dtype: float32 or bfloat16; None means float32 on the CPU and bfloat16 on CUDA.
            parallel: tensor x pipeline sizes and layout, when a launcher such as torchrun started several processes.

        Raises:
            CheckpointError: nothing there, damaged, or not a DeepSeek-VL model.
            DataError: the tokenizer is missing or does not belong to the model.
            UsageError: the layout fits neither the processes nor the model.
        """
        parallel = ParallelConfig() if parallel is None else parallel
        _start_world(parallel)
        source = find_model_on_every_rank(path)
        check_layout(source.config, parallel)
        stage = load_stage(source, dtype=dtype, parallel=parallel)
        return cls(stage, Processor(source.config, source.tokenizer))

    def score_requests(
        self,
        requests: Sequence[ScoreRequest],
        *,
        row_tokens: int = ROW_TOKENS,
        progress: Callable[[int], object] = lambda _: None,
        on_scores: Callable[[int, list[Score]], object] = lambda number, scores: None,
    ) -> list[list[Score]]:
        """Score encoded options; see `generate.score.score`.

        Raises:
            ImageError: an image cannot be read.
            NumericsError: a log-probability is not finite; the message names the request.
        """
        config = self.processor.config
        found = score(
            [self.stage],
            requests,
            config=config,
            row_tokens=row_tokens,
            progress=progress,
            on_scores=on_scores,
        )
        for request, scores in zip(requests, found, strict=True):
            if not all(math.isfinite(one.log_prob) for one in scores):
                values = [one.log_prob for one in scores]
                raise NumericsError(
                    f"{request.location + ': ' if request.location else ''}log-probabilities {values} are not finite; "
                    "the weights are damaged, or the model needs --dtype float32"
                )
        return found

    def score(
        self,
        prompt: str,
        options: Sequence[str],
        *,
        images: Sequence[ImageSource] = (),
        system: str | None = None,
        template: Template = "deepseek",
    ) -> list[Score]:
        """What the model thinks of each option as the answer to a prompt, which is read once.

        Args:
            options: texts that follow the prompt exactly as they are; an answer in the chat format begins with a space.
            images, system, template: as in `Processor`.

        Raises:
            DataError: a prompt and an option do not fit the model, or an image cannot be read.
            NumericsError: a log-probability is not finite.
        """
        text = self.processor.system(system)
        pieces = prompt_pieces(prompt, images=len(images), template=template, system=text)
        config, tokenizer = self.processor.config, self.processor.tokenizer
        request = encode_options(pieces, options, tokenizer=tokenizer, config=config, images=images)
        return self.score_requests([request])[0]

    def bits_per_byte(self, text: str, *, images: Sequence[ImageSource] = ()) -> float:
        """Bits that the model needs for a text after BOS and its images, over the text's UTF-8 bytes.

        A text longer than the model's positions is scored in windows.

        Raises:
            DataError: the text is empty, or does not fit the model together with its images.
            NumericsError: a log-probability is not finite.
        """
        if not text:
            raise DataError("text: is empty; give the text to be read")
        config, tokenizer = self.processor.config, self.processor.tokenizer
        windows = text_windows(text, tokenizer=tokenizer, config=config, images=images)
        nats = -math.fsum(scores[0].log_prob for scores in self.score_requests(windows))
        return nats / math.log(2) / len(text.encode())

    def generate(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Answer:
        """Answer one prompt.

        Args:
            sampling: how tokens are chosen; greedily by default.
            stop: texts before which the answer ends, besides the end-of-sentence token.

        Raises:
            DataError: prompt and answer do not fit the model's positions.
            NumericsError: the model's logits are not finite.
        """
        (answer,) = self.generate_batch([inputs], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        return answer

    def generate_batch(
        self,
        batch: Iterable[Inputs],
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        batch_size: int = 8,
    ) -> Iterator[Answer]:
        """Answers to many prompts in their order, each what it would be alone; see `generate`.

        Args:
            batch: prompts; they are fetched as earlier ones finish.
            sampling: how tokens are chosen; every answer has its own draws from the seed.
        """
        requests = (self.request(i, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop) for i in batch)
        return self.answers(requests, batch_size=batch_size)

    def answers(self, requests: Iterable[Request], *, batch_size: int = 8, length: int = 0) -> Iterator[Answer]:
        """Answers to requests in their order; `length` as in `generate.decode.generate`."""
        asked: dict[int, Request] = {}
        tokens: dict[int, list[int]] = {}
        done: dict[int, Answer] = {}
        ends, given = self.processor.end_ids, 0

        def counted() -> Iterator[Request]:
            for number, request in enumerate(requests):
                asked[number] = request
                yield request

        for number, token, ended in generate(self.stage, counted(), eos_id=ends, rows=batch_size, length=length):
            tokens.setdefault(number, []).append(token)
            if ended:
                ids = tuple(tokens.pop(number))
                request, text = asked.pop(number), self.processor.decode(ids)
                text = request.stop.truncate(text) if request.stop else text
                done[number] = Answer(prompt_tokens=len(request.ids), token_ids=ids, text=text)
            while given in done:
                yield done.pop(given)
                given += 1

    def stream(self, request: Request, *, strip: bool = False) -> Iterator[str]:
        """The text of an answer piece by piece; with `strip`, without white space around it."""
        text = TextStream(self.processor.tokenizer, strip=strip, stop=request.stop)
        for _, token, _ in generate(self.stage, [request], eos_id=self.processor.end_ids):
            yield text.add(token)
        yield text.end()

    def request(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Request:
        """A checked request; arguments as in `generate`."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: {max_new_tokens} must be at least 1")
        require_room(len(inputs.ids), room=max_new_tokens, config=self.processor.config)
        return Request(
            ids=inputs.ids,
            images=inputs.images,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            stop=StopTexts(stop, self.processor.tokenizer) if stop else None,
        )


def _turns(messages: Sequence[Message]) -> tuple[list[Turn], list[ImageSource]]:
    turns: list[Turn] = []
    images: list[ImageSource] = []
    for number, message in enumerate(messages, start=1):
        role, content = str(message.get("role", "")).lower(), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DataError(
                f"message {number}: {dict(message)} is not understood; give role (system, user or assistant), content "
                "(text) and, where it has some, images"
            )
        if role == "assistant" and number == len(messages) and not content.strip():
            break
        own = list(message.get("images") or ())
        turns.append(Turn(role=role, text=with_image_tags(content, images=len(own))))  # type: ignore[arg-type]
        images += own
    return turns, images


def _start_world(parallel: ParallelConfig) -> None:
    check_world(parallel)
    if not dist.is_initialized():
        groups.start(parallel, seed=0)
        atexit.register(groups.stop)
    at = groups.position()
    if (at.tp_size, at.pp_size) != (parallel.tensor, parallel.pipeline):
        raise UsageError(
            f"this process already runs as tensor {at.tp_size} x pipeline {at.pp_size}; open every model of a process "
            "with the same layout"
        )
