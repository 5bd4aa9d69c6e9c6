"""Prompts: text with image tags to token ids, and image files to canvases.

Legend: I images, C canvas side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.config.model import ModelConfig
from megavl.config.presets import ImageGeometry
from megavl.data.image import ImageError, canvas, decode_image, read_image_file, to_rgb
from megavl.data.template import (
    IMAGE_TAG,
    Piece,
    Template,
    Turn,
    document_pieces,
    encode,
    inference_prompt,
)
from megavl.data.tokenizer import Tokenizer


class StoredImage(Protocol):
    """An image file inside of another file, read when it is needed; its text names where it is."""

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: they cannot be read.
        """

    def __hash__(self) -> int:
        """Equal where it is the same image of the same file."""


ImageSource = str | Path | Image.Image | StoredImage


def prompt_pieces(
    text: str, *, images: int, template: Template = "deepseek", system: str = SYSTEM_PROMPT
) -> list[Piece]:
    """A prompt that waits for the model's answer.

    Args:
        text: the user's text; each `<image_placeholder>` stands for an image. Without any, images come first.
        template: `deepseek` is the chat format, ending with `Assistant:`. `plain` continues the text after BOS, as in
            training on documents. `none` continues the text alone.
        system: system text of the chat format; empty for none.

    Raises:
        DataError: image tags and images differ in number, or the prompt is empty.
    """
    text = with_image_tags(text, images=images)
    if template == "deepseek":
        return inference_prompt([Turn(role="user", text=text)], system=system)
    start = [Piece(kind="bos")] if template == "plain" else []
    body = document_pieces(text, template="none", tagged=True)
    pieces = [*start, *(replace(piece, supervised=False) for piece in body)]
    if not pieces:
        raise DataError("the prompt is empty; give text or an image, or a template that puts a token in front")
    return pieces


def with_image_tags(text: str, *, images: int) -> str:
    """A text with one `<image_placeholder>` for each image; without any, images come first.

    Raises:
        DataError: image tags and images differ in number.
    """
    tags = text.count(IMAGE_TAG)
    if not tags:
        return IMAGE_TAG * images + text
    if tags != images:
        raise DataError(
            f"the prompt has {tags} {IMAGE_TAG}, but {images} images are given; give one image for each place, "
            "or leave the places out to put all images in front"
        )
    return text


def encode_prompt(pieces: Sequence[Piece], *, tokenizer: Tokenizer, config: ModelConfig, room: int) -> list[int]:
    """Token ids of a prompt.

    Args:
        room: tokens that must fit after the prompt.

    Raises:
        DataError: the prompt is too long for the model, or its text spells the image token.
    """
    ids = [int(token) for token in encode(pieces, tokenizer=tokenizer, image_tokens=config.image_tokens).ids]
    require_room(len(ids), room=room, config=config)
    return ids


def require_room(tokens: int, *, room: int, config: ModelConfig) -> None:
    """Check that a prompt and `room` tokens after it fit the model.

    Raises:
        DataError: they do not.
    """
    limit = config.llm.max_position_embeddings
    if tokens + room > limit:
        raise DataError(
            f"{tokens} prompt tokens and {room} after them exceed the model's {limit} positions; shorten the prompt "
            "or ask for fewer tokens"
        )


def read_canvases(sources: Sequence[ImageSource], *, geometry: ImageGeometry) -> torch.Tensor:
    """Image files or images in memory as canvases for the first stage: uint8 (I, 3, C, C).

    Raises:
        ImageError: a file is missing, damaged or not an image; the message names it.
    """
    canvases = [image_canvas(image_content(source), geometry=geometry, source=source) for source in sources]
    if not canvases:
        return torch.zeros((0, 3, geometry.canvas_size, geometry.canvas_size), dtype=torch.uint8)
    return torch.stack(canvases)


def image_content(source: ImageSource) -> Image.Image | bytes:
    """An image in memory as it is, or the bytes of an image file.

    Raises:
        ImageError: the file cannot be read; the message names it.
    """
    if isinstance(source, Image.Image):
        return source
    with _naming(source):
        return read_image_file(Path(source)) if isinstance(source, (str, Path)) else source.read()


def image_canvas(content: Image.Image | bytes, *, geometry: ImageGeometry, source: ImageSource) -> torch.Tensor:
    """Canvas uint8 (3, C, C) of the content of a source.

    Raises:
        ImageError: it is damaged or no image; the message names the source.
    """
    if isinstance(content, bytes):
        with _naming(source):
            image = decode_image(content)
    else:
        image = to_rgb(content)
    return torch.from_numpy(canvas(image, geometry=geometry))


def end_ids(config: ModelConfig, *, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: those that the model states, else the tokenizer's EOS."""
    return config.eos_token_ids or (tokenizer.eos_id,)


def answer_text(ids: Sequence[int], *, tokenizer: Tokenizer) -> str:
    """Text of generated ids without special tokens; ids beyond the tokenizer's vocabulary have no text."""
    return tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])


@contextmanager
def _naming(source: ImageSource) -> Iterator[None]:
    """Errors about an image name its source."""
    try:
        yield
    except ImageError as error:
        reason = str(error)
        if str(source) in reason:
            raise
        raise ImageError(f"{source}: {reason}; give an image that opens", error.reason) from error
