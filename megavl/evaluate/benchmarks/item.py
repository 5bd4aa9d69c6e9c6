"""A question of a benchmark, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavl.generate.prompt import ImageSource


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question as the model gets it, and what its answer is compared with."""

    id: str
    """Of the row, unique in its benchmark."""
    location: str
    """`file:line` or `file: row N`, for messages."""
    prompt: str
    """With one IMAGE_TAG for each image, or none: images then stand in front."""
    images: tuple[ImageSource, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    """Texts of the options by their letter; empty for an open question."""
    answer: str
    """The letter of the right option, or the right text; of several right texts the first."""
    answers: tuple[str, ...] = ()
    """Of an open question every right text."""
    choices: tuple[str, ...] = ()
    """What is scored by perplexity; empty where the question cannot be asked so."""
    kind: str = ""
    """Group in the report."""
    group: str = ""
    """Rows of one group count as one question that must be answered right in each; "" for none."""
    details: Mapping[str, str] = field(default_factory=dict)
    """What else the parser or the aggregate reads."""

    def described(self) -> dict[str, Any]:
        """What `answers.jsonl` says about the question; images that are stored in another file have no path."""
        images = [str(image.absolute()) for image in self.images if isinstance(image, Path)]
        found = {"id": self.id, "category": self.kind, "images": images, "question": self.prompt}
        return {**found, "reference": list(self.answers) or self.answer}

    @property
    def right_choice(self) -> int:
        """Index of the right choice."""
        return self.choices.index(self.answer)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An item, what the model said, and how it counts."""

    item: Item
    text: str
    """The model's answer; the choice where choices were scored."""
    prediction: str | None
    """What the parser found in it; None: nothing, which counts as wrong."""
    score: float | None
    """0 to 1; None where only a judge could tell."""
