"""The files that `--input` names: files, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence

from megavl.config.errors import UsageError

_KINDS = (".jsonl", ".ndjson", ".json", ".tar", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
"""Also what no reader takes: an error is better than a file that is left out in silence."""
_PARTS = ("train", "test", "validation", "val", "dev")
"""How files of the parts of a data set on the Hugging Face Hub begin."""
_DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""What the library `datasets` writes beside its data; img2dataset writes `00000_stats.json`."""


def input_files(sources: Sequence[str]) -> list[str]:
    """Files in the order of their sources; those of a folder or pattern are sorted, and no file comes twice from them.

    Args:
        sources: files, folders, and patterns with `*`, `?`, `[...]` or `**`. A folder stands for all files below it of
            a known kind, without hidden ones. Links to folders are not followed. A file of that name is no pattern.

    Raises:
        UsageError: a folder or pattern has no such file, or a folder cannot be read.
    """
    files: dict[str, None] = {}
    named: list[str] = []
    for source in sources:
        if os.path.isdir(source):
            found = sorted(_below(source))
            _refuse_mixed_parts(source, found)
            missing = f"no file below it ends in {', '.join(_KINDS)}, or in one of these and .gz or .zst"
        elif glob.has_magic(source) and not os.path.lexists(source):
            found = list(_matching(source))
            missing = "no file matches; quote the pattern, and check the folder that it starts from"
        else:
            named.append(source)
            continue
        if not found:
            raise UsageError(f"--input {source}: {missing}")
        # Some writers of shards leave an empty last one. img2dataset describes 00000.tar once more in 00000.parquet.
        found = [file for file in found if os.path.getsize(file) and not _describes_tar(file)] or found
        new = [file for file in dict.fromkeys(found) if file not in files]
        files.update(dict.fromkeys(new))
        named += new
    return named


def _refuse_mixed_parts(folder: str, files: Sequence[str]) -> None:
    """Raise UsageError where a folder holds the training and the test part of a data set."""
    parts = {name: file for file in files if (name := os.path.basename(file).partition("-")[0]) in _PARTS}
    if len(parts) > 1:
        patterns = [os.path.join(os.path.dirname(file), f"{name}-*") for name, file in sorted(parts.items())]
        raise UsageError(
            f"--input {folder}: holds {' and '.join(sorted(parts))} files, which are different parts of a data set; "
            f"name those to train on, such as '{patterns[-1]}'"
        )


def _describes_tar(file: str) -> bool:
    return file.endswith(".parquet") and os.path.isfile(file.removesuffix("parquet") + "tar")


def _matching(pattern: str) -> Iterator[str]:
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            yield from sorted(_below(path))
        elif _is_input(os.path.basename(path)) or not path.endswith(".json"):
            yield path


def _below(folder: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise UsageError(f"--input {error.filename}: cannot read ({error.strerror}); give a readable folder") from error

    for path, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(path, name) for name in files if _is_input(name))


def _is_input(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower())
    plain = stem if suffix in _COMPRESSED else name.lower()
    described = name in _DESCRIPTIONS or name.endswith("_stats.json")
    return plain.endswith(_KINDS) and not name.startswith(".") and not described
