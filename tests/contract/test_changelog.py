"""CHANGELOG.md follows Keep a Changelog: versions newest first, known groups, one short sentence an entry."""

from __future__ import annotations

import re
from pathlib import Path

from megavl.config.version import VERSION

CHANGELOG = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text()
GROUPS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_versions_are_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    versions = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:]]
    assert all(versions)
    numbers = [tuple(map(int, version.groups())) for version in versions if version]
    assert numbers == sorted(numbers, reverse=True)
    assert ".".join(map(str, numbers[0])) == VERSION


def test_groups_are_known() -> None:
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)) <= GROUPS


def test_an_entry_is_one_short_sentence() -> None:
    entries = re.findall(r"^- (.*(?:\n  .*)*)", CHANGELOG, re.MULTILINE)
    assert entries
    assert [entry for entry in entries if not re.fullmatch(r"[A-Z`].*[^.]\.", entry, re.DOTALL)] == []
    assert [entry for entry in entries if entry.count("\n") > 1] == []
