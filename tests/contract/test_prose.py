"""READMEs and docstrings are readable: no endless sentence, few long ones, no word that the field does not use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.prose import LONG, LONGEST, MAX_LONG_SHARE, avoided, sentences, words


@pytest.fixture(scope="module")
def prose(project_files: list[Path], root: Path) -> list[tuple[str, str]]:
    """File and sentence of all prose; the changelog and committed reports record what was said at the time."""
    files = [
        path
        for path in project_files
        if path.suffix in (".py", ".md") and path.name != "CHANGELOG.md" and path.parent.name != "results"
    ]
    return [(str(path.relative_to(root)), sentence) for path in files for sentence in sentences(path)]


def test_no_sentence_is_endless(prose: list[tuple[str, str]]) -> None:
    assert [(name, text) for name, text in prose if words(text) > LONGEST] == []


def test_few_sentences_are_long(prose: list[tuple[str, str]]) -> None:
    long = [(name, text) for name, text in prose if words(text) > LONG]
    assert len(long) < MAX_LONG_SHARE * len(prose), long


def test_no_avoided_word(prose: list[tuple[str, str]]) -> None:
    assert [(name, note, text) for name, text in prose for note in avoided(text)] == []


def test_the_checks_find_what_they_look_for() -> None:
    assert list(avoided("It waits behind the anchor.")) == ["'behind': say after", "'anchor': say dummy image"]
    assert list(avoided("Rows are sorted in place, which takes place once.")) == []
    assert words("One `name` counts, 2.5 times.") == 5
