"""The image shuffle: no question keeps an image, and every image is used as often as before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megavl.config.errors import DataError
from megavl.evaluate.image_shuffle import shuffle_images
from megavl.evaluate.task import Question


def asked(images: tuple[str, ...]) -> Question:
    return Question(
        id="q", location="t:1", images=tuple(map(Path, images)), prompt="?", choices=("a", "b"), answer=0, kind="k"
    )


picked = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=2).map(tuple), min_size=1, max_size=40)


@given(picked, st.integers(0, 9))
def test_no_question_sees_an_image_of_its_own(images, seed):
    questions = [asked(one) for one in images]
    counts = Counter(image for one in images for image in one)
    one_each = all(len(one) <= 1 for one in images)
    possible = one_each and counts and 2 * max(counts.values()) <= sum(counts.values())
    try:
        found = shuffle_images(questions, seed=seed)
    except DataError as error:
        assert "--blind" in str(error) and not possible
        return
    assert [len(one) for one in found] == [len(one) for one in images]
    assert Counter(str(image) for one in found for image in one) == counts
    assert not any(set(other) & set(question.images) for question, other in zip(questions, found))
    assert found == shuffle_images(questions, seed=seed)


@given(st.integers(2, 60), st.integers(0, 99))
def test_every_image_is_used_once(count, seed):
    questions = [asked((str(number),)) for number in range(count)]
    found = shuffle_images(questions, seed=seed)
    assert sorted(found) == sorted(question.images for question in questions)
    assert all(other != question.images for question, other in zip(questions, found))


def test_seed_decides_the_shuffle():
    questions = [asked((str(number),)) for number in range(30)]
    assert shuffle_images(questions, seed=0) != shuffle_images(questions, seed=1)
