"""Writes images, and makes the captions, conversations and held-out questions about them."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_tools.corpus.demo import charts, details, rendered_text, shapes
from data_tools.corpus.demo.family import Answers, Family, Level, Picture, Question
from data_tools.corpus.demo.questions import PLACEHOLDER, balanced_choices
from megavl.config.errors import DataError

FAMILIES: Mapping[str, Family] = {"shapes": shapes.LEVELS, "charts": charts.LEVELS, "ocr": rendered_text.LEVELS}
"""Picture families by command name."""

DETAILS = "details"
"""The family of `demo --details`; its questions and answers have the words of the others."""

_LEVELS: Mapping[str, Family] = {**FAMILIES, DETAILS: details.LEVELS}

Mix = Mapping[tuple[str, str], float]
"""Share of the training pictures by (family, level)."""

MAX_QUESTIONS = 3
"""Largest number of questions in one conversation."""
_ATTEMPTS = 100


@dataclass(kw_only=True)
class PictureSet:
    """The records of all pictures written so far."""

    folder: Path
    seed: int
    captions: list[dict[str, Any]] = field(default_factory=list)
    conversations: list[dict[str, Any]] = field(default_factory=list)
    side: int | None = None
    """Longest side of the written images, pixels; None leaves them as they are drawn."""
    seen: set[bytes] = field(default_factory=set)
    """SHA-256 of each image file. No picture is written twice, so no held-out one is in the training set."""

    def add_training(self, mix: Mix, *, count: int) -> None:
        """Draw `count` pictures with a caption and a conversation each. Call `add_heldout` before."""
        names, weights = list(mix), list(mix.values())
        for number in tqdm(range(count), unit="image", desc="pictures", disable=None):
            rng = random.Random(f"train/{self.seed}/{number}")
            family, level_name = rng.choices(names, weights)[0]
            level = _LEVELS[family][level_name]
            identifier = f"{family}-{level_name}-{number:06d}"
            path = f"images/train/{identifier}.png"
            picture = self._write(path, level=level, rng=rng, wanted={})
            self.captions.append({"id": identifier, "image": path, "text": picture.caption})
            turns = list(_turns(picture.answers, level=level, rng=rng))
            self.conversations.append({"id": identifier, "image": path, "conversations": turns})

    def add_heldout(self, levels: list[tuple[str, str]], *, per_question: int) -> list[dict[str, Any]]:
        """Draw `per_question` pictures for each kind of question; returns one multiple-choice question on each."""
        tasks: list[dict[str, Any]] = []
        kinds = [
            (level, question) for name, key in levels for level in [_LEVELS[name][key]] for question in level.questions
        ]
        for level, question in tqdm(kinds, unit="kind", desc="held-out", disable=None):
            rng = random.Random(f"heldout/{self.seed}/{question.kind}")
            for number, choice in enumerate(balanced_choices(question, count=per_question, rng=rng)):
                identifier = f"{question.kind}-{number:04d}"
                path = f"images/heldout/{identifier}.png"
                self._write(path, level=level, rng=rng, wanted={question.kind: choice.value})
                tasks.append(
                    {
                        "id": identifier,
                        "images": [path],
                        "prompt": PLACEHOLDER + question.text,
                        "choices": list(choice.options),
                        "answer": choice.answer,
                        "kind": question.kind,
                    }
                )
        # After the shuffle, adjacent tasks share neither kind nor answer, so image shuffle gives a fair wrong image.
        random.Random(f"order/{self.seed}").shuffle(tasks)
        return tasks

    def _write(self, path: str, *, level: Level, rng: random.Random, wanted: Answers) -> Picture:
        """Draw and save a picture that differs from all earlier ones."""
        for _ in range(_ATTEMPTS):
            picture = level.draw(rng, wanted)
            buffer = io.BytesIO()
            _reduced(picture.image, side=self.side).save(buffer, "PNG", compress_level=3)
            key = hashlib.sha256(buffer.getvalue()).digest()
            if key not in self.seen:
                self.seen.add(key)
                target = self.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(buffer.getvalue())
                return picture
        raise DataError(f"{path}: no new picture in {_ATTEMPTS} attempts; lower --samples or choose another --level")


def _reduced(image: Image.Image, *, side: int | None) -> Image.Image:
    """The picture with its longest side reduced to `side` pixels."""
    if side is None or max(image.size) <= side:
        return image
    width, height = (max(1, round(length * side / max(image.size))) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _turns(answers: Answers, *, level: Level, rng: random.Random) -> Iterator[dict[str, str]]:
    """One to three questions of the level in random order, with the image before the first."""
    asked = rng.sample(level.questions, rng.randint(1, min(MAX_QUESTIONS, len(level.questions))))
    for number, question in enumerate(asked):
        yield {"from": "human", "value": ("<image>" if number == 0 else "") + question.text}
        yield {"from": "gpt", "value": answers[question.kind]}


def all_questions() -> list[Question]:
    """Every question of every family and level."""
    return [question for family in FAMILIES.values() for level in family.values() for question in level.questions]


def phrases() -> list[str]:
    """All questions, and all answers with the space that precedes them in a conversation."""
    return [
        text for question in all_questions() for text in (question.text, *(f" {value}" for value in question.values))
    ]
