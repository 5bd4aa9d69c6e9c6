"""The benchmark of full-size conversion measures the model that it was asked for, or nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.bench import convert_full


def test_a_named_model_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20e9))
    monkeypatch.setattr(sys, "argv", ["convert_full", "--preset", "7b", "--scratch", str(tmp_path)])
    monkeypatch.setattr(convert_full, "round_trip", lambda *_: pytest.fail("it measured another model"))
    monkeypatch.setattr(convert_full, "write_report", lambda *_: pytest.fail("it reported another model"))
    with pytest.raises(SystemExit, match=r"7b needs 30\.8 GB free .* 20\.0 GB"):
        convert_full.main()
