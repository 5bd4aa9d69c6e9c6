"""A conversation whose earlier turns stay in the key-value cache.

Every turn has the prompt of the whole conversation. The cache is kept up to the first token that differs from that
prompt, and the model reads the rest. So a conversation answers exactly as it would from scratch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from itertools import takewhile

import torch

from megavl.data.template import Turn, inference_prompt
from megavl.generate.engine import Engine
from megavl.generate.pretrained import Model
from megavl.generate.prompt import ImageSource, with_image_tags
from megavl.generate.sampling import Sampling, choose
from megavl.generate.stream import TextStream


class Conversation:
    """Turns of a user and of a model on one process."""

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
    ) -> None:
        """A conversation without turns.

        Args:
            system: system text; empty for none, None for the model's.
            sampling: how tokens are chosen; one generator with its seed draws for all answers.
        """
        self.turns: list[Turn] = []
        self.reused = 0
        """Tokens of the latest prompt that were already in the cache."""
        self._model, self._max_new_tokens = model, max_new_tokens
        self._system = model.processor.system(system)
        self._sampling = sampling or Sampling()
        self._generator = self._sampling.generator()
        self._engine = Engine(model.stage)
        self._images = model.processor.read_images([])
        self._cached: list[int | bytes] = []
        """The contents of the cache, as `_keys` gives them."""

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self._images = [], self._images[:0]

    def ask(self, text: str, images: Sequence[ImageSource] = ()) -> Generator[str, None, None]:
        """The answer to a new turn, piece by piece, without white space around it.

        To stop an answer, close the iterator or interrupt it. The turn then keeps the text that was shown. A turn that
        fails before its answer begins leaves the conversation unchanged.

        Args:
            text: what the user says; `<image_placeholder>` marks an image's position, else images come first.

        Raises:
            DataError: image tags and images differ in number, an image cannot be read, or the conversation is too long.
            NumericsError: the model's logits are not finite.
        """
        processor = self._model.processor
        turns = [*self.turns, Turn(role="user", text=with_image_tags(text, images=len(images)))]
        canvases = torch.cat([self._images, processor.read_images(images)])
        prompt = processor.encode(inference_prompt(turns, system=self._system))
        answer = TextStream(processor.tokenizer, strip=True)
        try:
            for token in self._tokens(prompt, canvases):
                yield answer.add(token)
            yield answer.end()
        finally:
            if answer.shown:
                self.turns, self._images = [*turns, Turn(role="assistant", text=answer.shown)], canvases

    def _tokens(self, prompt: list[int], canvases: torch.Tensor) -> Iterator[int]:
        processor, engine = self._model.processor, self._engine
        room = processor.config.llm.max_position_embeddings - len(prompt)
        logits = self._read(prompt, canvases)
        present = set(prompt)
        for count in range(1, min(self._max_new_tokens, room) + 1):
            token = choose(logits, sampling=self._sampling, generator=self._generator, present=present)
            yield token
            if token in processor.end_ids or count == min(self._max_new_tokens, room):
                return
            present.add(token)
            logits = self._last(engine.extend(0, [token]))
            self._cached.append(token)

    def _read(self, prompt: list[int], canvases: torch.Tensor) -> torch.Tensor:
        """Logits after a prompt; the model reads what is not in the cache, and at least the last token."""
        config = self._model.processor.config
        keys = self._keys(prompt, canvases)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._cached, keys[:-1])))
        # An image is read as a whole.
        seen, part = divmod(prompt[:kept].count(config.image_token_id), config.image_tokens)
        kept -= part
        self._engine.cache.truncate(0, kept)
        self._cached = keys[:kept]
        logits = self._last(self._engine.extend(0, prompt[kept:], images=canvases[seen:]))
        self._cached, self.reused = keys, kept
        return logits

    def _keys(self, prompt: list[int], canvases: torch.Tensor) -> list[int | bytes]:
        """One key per token of a prompt: its id, or at an image's positions a hash of the pixels."""
        config = self._model.processor.config
        hashes = (hashlib.sha256(canvas.numpy().data).digest() for canvas in canvases)
        images = (one for one in hashes for _ in range(config.image_tokens))
        return [next(images) if token == config.image_token_id else token for token in prompt]

    @staticmethod
    def _last(logits: torch.Tensor | None) -> torch.Tensor:
        assert logits is not None, "a conversation runs on one process"
        last: torch.Tensor = logits[0]
        return last
