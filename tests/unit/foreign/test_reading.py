"""Errors about files that are none cross processes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest

from megavl.foreign.reading import NotRegularError, open_regular


@pytest.mark.parametrize("kind", ["a FIFO", "a folder"])
def test_a_copied_error_says_the_same(tmp_path: Path, kind: str) -> None:
    """Worker processes send their errors in the way that copies are made."""
    path = tmp_path / "odd"
    os.mkfifo(path) if kind == "a FIFO" else path.mkdir()
    with pytest.raises(NotRegularError) as caught:
        open_regular(path)
    copied = copy.copy(caught.value)
    assert type(copied) is NotRegularError and str(copied) == str(caught.value) == f"{kind}, not a regular file"
    assert copied.errno == caught.value.errno
