"""A task on disk, with pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.generate import models

CHOICES = ["red", "green", "blue", "dark red", "dark green"]


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine questions of three kinds: one image, two images, none; options of one token and of several."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "images").mkdir()
    lines = []
    for number in range(9):
        names = [f"images/{number}-{i}.png" for i in range((number + 1) % 3)]
        for i, name in enumerate(names):
            models.write_picture(folder / name, seed=10 * number + i)
        lines.append(
            {
                "id": f"q{number}",
                "images": names,
                "prompt": "<image_placeholder>" * len(names) + f"which colour is it, number {number}?",
                "choices": CHOICES[: 2 + number % 4],
                "answer": number % 2,
                "kind": f"{len(names)} images",
            }
        )
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
