"""Prompts with options, and texts, as the requests that `generate.score` takes."""

from __future__ import annotations

from collections.abc import Sequence

from megavl.config.errors import DataError
from megavl.config.model import ModelConfig
from megavl.data.template import Piece, document_pieces, encode_batch
from megavl.data.tokenizer import Tokenizer
from megavl.generate.score_rows import EncodedOption, ImageSource, ScoreRequest


def encode_options(
    pieces: Sequence[Piece],
    options: Sequence[str],
    *,
    tokenizer: Tokenizer,
    config: ModelConfig,
    images: Sequence[ImageSource] = (),
    location: str = "",
) -> ScoreRequest:
    """A prompt followed by each option, exactly as the option is given.

    Prompt and option are tokenized together, so an option has the tokens that training saw.

    Raises:
        DataError: a prompt and an option are longer than the model's positions, or an option has no token of its own.
    """
    samples = [[*pieces, Piece(kind="text", text=option, supervised=True)] for option in options]
    found = []
    for option, sample in zip(options, encode_batch(samples, tokenizer=tokenizer, image_tokens=config.image_tokens)):
        if len(sample.spans) != 1 or sample.spans[0][0] == 0:
            raise DataError(f"choices: {option.strip()!r} has no token of its own after the prompt")
        if len(sample.ids) > config.llm.max_position_embeddings:
            raise DataError(
                f"{len(sample.ids)} tokens exceed the model's {config.llm.max_position_embeddings} positions; shorten "
                "the prompt"
            )
        found.append(EncodedOption(ids=tuple(map(int, sample.ids)), start=sample.spans[0][0]))
    return ScoreRequest(options=tuple(found), images=tuple(images), location=location)


def text_windows(
    text: str,
    *,
    tokenizer: Tokenizer,
    config: ModelConfig,
    images: Sequence[ImageSource] = (),
    location: str = "",
) -> list[ScoreRequest]:
    """A text as documents are trained: BOS and the images, then the text. Its tokens are the options.

    A text longer than the model's positions has several windows. Every token is predicted once; a further window
    begins with the last token of the one before it.

    Raises:
        DataError: a text with images is longer than the model's positions, or yields the image token.
    """
    limit = config.llm.max_position_embeddings
    marks = [Piece(kind="image") for _ in images]
    pieces = [Piece(kind="bos"), *marks, *document_pieces(text, template="none", tagged=False)]
    (sample,) = encode_batch([pieces], tokenizer=tokenizer, image_tokens=config.image_tokens)
    ids, start = tuple(map(int, sample.ids)), 1 + config.image_tokens * len(images)
    if images and len(ids) > limit:
        raise DataError(
            f"text: {len(ids)} tokens with its images exceed the model's {limit} positions; shorten the text"
        )
    return [
        ScoreRequest(
            options=(EncodedOption(ids=ids[first : first + limit], start=1 if first else start),),
            images=tuple(images),
            location=location,
        )
        for first in range(0, len(ids) - 1, limit - 1)
    ]
