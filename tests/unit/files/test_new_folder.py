"""New folders appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavl.files.new_folder import new_folder


def test_the_working_folder_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.chdir(output)
    with new_folder(Path("."), name="output") as folder:
        (folder / "file").write_text("content")
        assert not [*output.iterdir()]
    assert (output / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
