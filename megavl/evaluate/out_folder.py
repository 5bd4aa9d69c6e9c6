"""The folder of an evaluation: `answers.jsonl` while it runs, then `report.json`, `report.md` and `report.svg`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.config.errors import UsageError
from megavl.evaluate.picture import picture
from megavl.evaluate.report import Report
from megavl.evaluate.report_page import page
from megavl.files.durable import replace_durably, storage_errors
from megavl.files.hashing import file_sha256
from megavl.files.owner import Owner
from megavl.files.ownership import Ownership, take


def make_folder(path: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        StorageError: it cannot be made.
        UsageError: something else has its name, or its parent is missing.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out: {path} is no directory; give another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--out: {path.parent} is no directory; create it first")
    with storage_errors(f"--out: {path} cannot be made"):
        path.mkdir(exist_ok=True)
    return path


def take_folder(path: Path) -> Ownership:
    """The folder, made if it is not there, which this process owns until the context ends.

    Raises:
        StorageError: it cannot be made or written.
        UsageError: as `make_folder`, or another evaluation writes it.
    """
    return take(make_folder(path), Owner.this_process(), name="--out")


def model_fingerprint(path: Path) -> str:
    """Of the names and contents of a model's files, which are read whole.

    Raises:
        StorageError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with storage_errors(f"{path}: cannot be read"):
        for file in sorted(one for one in path.rglob("*") if one.is_file()):
            digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def write_report(folder: Path, report: Report, *, about: Mapping[str, Any]) -> None:
    """Write the three forms of a report.

    Args:
        about: what was evaluated and how, for the head of each.

    Raises:
        StorageError: the folder cannot be written.
    """
    content = {**about, **report.to_dict()}
    files = {
        "report.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "report.md": page(report, about=about),
        "report.svg": picture(report, title=str(about.get("model", ""))),
    }
    write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts by name into a folder; each appears whole or not at all.

    Raises:
        StorageError: the folder cannot be written.
    """
    for name, text in files.items():
        with storage_errors(f"{folder / name}: cannot be written"):
            replace_durably(folder / name, text.encode("utf-8", "replace"))
