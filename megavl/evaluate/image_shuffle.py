"""The image shuffle of `--blind`: every question gets the images of other questions.

A question that is still answered right was answered without looking at its image.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megavl.config.errors import DataError
from megavl.evaluate.task import Question


def shuffle_images(questions: Sequence[Question], *, seed: int) -> list[tuple[Path, ...]]:
    """As many images for each question as it has, none of them its own.

    Every image is used as often as it was. The images are put in a random order, equal ones together, and then
    rotated by a fixed number.

    Raises:
        DataError: no question has an image, or an image is shown so often that no shuffle exists.
    """
    counts = Counter(image for question in questions for image in question.images)
    if not counts:
        raise DataError("--blind: no question has an image to be replaced; leave the option out")
    order = list(counts)
    random.Random(seed).shuffle(order)
    rank = {image: number for number, image in enumerate(order)}
    shown = sorted(
        ((number, image) for number, question in enumerate(questions) for image in question.images),
        key=lambda one: rank[one[1]],
    )
    commonest, most = counts.most_common(1)[0]
    # A shift by `most` leads out of every run of equal images; questions that show several may need a larger one.
    for shift in range(most, len(shown) - most + 1):
        lent = shown[shift:] + shown[:shift]
        if all(image not in questions[number].images for (number, _), (_, image) in zip(shown, lent)):
            found: list[list[Path]] = [[] for _ in questions]
            for (number, _), (_, image) in zip(shown, lent):
                found[number].append(image)
            return [tuple(images) for images in found]
    raise DataError(
        f"--blind: not every question can get images that are not its own ({commonest} is shown {most} times among "
        f"{len(shown)}); add questions on other images or leave the option out"
    )
