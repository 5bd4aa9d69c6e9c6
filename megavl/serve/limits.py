"""What one request, and all of them together, may take of the server."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = 4096
"""Default length of a prompt with its answer: what DeepSeek-VL is trained with, though its positions reach further."""
BODY_SECONDS = 60.0
"""Time in which a request's body must arrive."""
SEND_SECONDS = 60.0
"""Time in which a client must take a piece of its answer."""
HEAD_SECONDS = 60.0
"""Time in which a connection must bring the headers of its next request, and take the rest of the answer before."""
MORE_CONNECTIONS = 256
"""Connections beyond the requests that are answered or wait."""
RETRY_SECONDS = 5
"""After which a client that was turned away should ask again."""
CHARACTERS_OF_A_TOKEN = 256
"""No text is tokenized that is longer than this many characters for each token that fits."""
MAX_PROMPTS = 4096
"""Prompts of one request to `/v1/completions`."""
MAX_SCORES = 200_000
"""Log-probabilities in one answer, alternatives included; each takes about 200 bytes."""
MAX_MESSAGES = 4096
"""Messages of one conversation."""
MAX_PARTS = 4096
"""Texts and images of one message."""
MAX_STOPS = 16
"""Stop texts of one request."""
MAX_ALTERNATIVES = 20
"""Likeliest tokens that may be asked for at each position."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that the command's options set."""

    tokens: int
    """Of a prompt with its answer."""
    rows: int = 8
    """Answers in progress at a time."""
    waiting: int = 64
    """Requests that wait beyond these; further ones are turned away."""
    body: int = 20 << 20
    """Bytes of a request."""
    images: int = 8
    """Images of a request; each has at most the pixels that `megavl.data.image` allows."""
    seconds: float = 600.0
    """Time of a request; an answer that is not complete then ends."""

    @property
    def connections(self) -> int:
        """Clients that may be connected at a time."""
        return self.rows + self.waiting + MORE_CONNECTIONS
