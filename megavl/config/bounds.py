"""Types of the numbers and paths in a recipe or a model, with their bounds.

What is larger would overflow in a library, or fill the memory with names of layers, before anything says why.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

MAX_COUNT = 10**9
"""Largest number of steps, sequences, tokens or seconds."""
MAX_LAYERS = 4096
"""Largest number of layers."""
MAX_SIZE = 1 << 24
"""Largest other size of a model."""
MAX_PROCESSES = 1024
"""Most threads or worker processes of a rank."""


def _no_truth_value(value: object) -> object:
    """YAML's `true` is a 1 to Python, but no number to the person who wrote it."""
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


_NUMBER = BeforeValidator(_no_truth_value)

Positive = Annotated[int, Field(gt=0, le=MAX_COUNT), _NUMBER]
NonNegative = Annotated[int, Field(ge=0, le=MAX_COUNT), _NUMBER]
Size = Annotated[int, Field(gt=0, le=MAX_SIZE), _NUMBER]
Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS), _NUMBER]
Threads = Annotated[int, Field(gt=0, le=MAX_PROCESSES), _NUMBER]
Workers = Annotated[int, Field(ge=0, le=MAX_PROCESSES), _NUMBER]
Seed = Annotated[int, Field(ge=0, lt=2**63), _NUMBER]

Fraction = Annotated[float, Field(ge=0.0, le=1.0), _NUMBER]
Decay = Annotated[float, Field(ge=0.0, lt=1.0), _NUMBER]
"""Of a moment estimate: with 1 it would stay zero."""
Real = Annotated[float, Field(allow_inf_nan=False), _NUMBER]
PositiveReal = Annotated[float, Field(gt=0.0, allow_inf_nan=False), _NUMBER]
NonNegativeReal = Annotated[float, Field(ge=0.0, allow_inf_nan=False), _NUMBER]


def _plain_path(path: str) -> str:
    if not path.strip():
        raise ValueError("it is empty, which would be the working directory; name a path, or '.'")
    if path.startswith("~") and "/" in path:
        raise ValueError(f"it begins with ~, which no shell has replaced; write the whole path, or ./{path}")
    return path


PathText = Annotated[str, AfterValidator(_plain_path)]
