"""The files that `--input` names: files, folders and patterns."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_tools.readers.arrow_file import is_arrow
from data_tools.readers.parquet_table import MAGIC
from data_tools.readers.references import KIND_OF_SUFFIX
from megavl.config.errors import UsageError
from megavl.foreign.reading import open_regular

_KINDS = (".jsonl", ".ndjson", ".json", ".tar", ".parquet", ".arrow")
_TABLES = (".pq", ".parq", ".feather", ".ipc", ".arrows")
"""Further names of tables, where the first bytes decide."""
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".br", ".snappy", ".zip")
"""Also what no reader takes: an error is better than a file that is left out in silence."""
_PARTS = ("train", "test", "validation", "val", "dev")
"""How files of the parts of a data set on the Hugging Face Hub begin."""
_DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""What the library `datasets` writes beside its data; img2dataset writes `00000_stats.json`."""


def input_files(sources: Sequence[str], *, left_out: Counter[str] | None = None) -> list[str]:
    """Files in the order of their sources; those of a folder or pattern are sorted, and no file comes twice from them.

    Args:
        sources: files, folders, and patterns with `*`, `?`, `[...]` or `**`. A folder stands for all files below it of
            a known kind, without hidden ones. Links to folders are not followed. A file of that name is no pattern.
        left_out: gets the number of files of folders that are not read, by the end of their names. Images and clips do
            not count: records name them.

    Raises:
        UsageError: a folder or pattern has no such file, or a folder cannot be read.
    """
    named: list[str] = []
    others: set[str] = set()
    for source in sources:
        unread: list[str] = []
        if os.path.isdir(source):
            found = sorted(_below(source, unread=unread))
            _refuse_mixed_parts(source, found)
            missing = f"no file below it ends in {', '.join(_KINDS)}, or in one of these and .gz or .zst"
        elif glob.has_magic(source) and not os.path.lexists(source):
            found = list(_matching(source, unread=unread))
            missing = "no file matches; quote the pattern, and check the folder that it starts from"
        else:
            named.append(source)
            continue
        if not found:
            held = f"; it holds {counted(_ends(unread))}; convert records to JSONL or Parquet" if unread else ""
            raise UsageError(f"--input {source}: {missing}{held}")
        # Some writers of shards leave an empty last one. img2dataset describes 00000.tar once more in 00000.parquet.
        others |= {file for file in unread if file.rpartition(".")[2].lower() not in KIND_OF_SUFFIX}
        others |= {file for file in found if _describes_tar(file)}
        found = [file for file in found if not _is_empty(file) and not _describes_tar(file)] or found
        known = set(map(os.path.abspath, named))
        named += [file for file in dict.fromkeys(found) if os.path.abspath(file) not in known]
    if left_out is not None:
        left_out.update(_ends(others - {*named}))
    return named


def counted(ends: Mapping[str, int]) -> str:
    """`3 .csv, 1 .txt.gz`"""
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items(), key=lambda item: (-item[1], item[0])))


def _ends(files: Iterable[str]) -> Counter[str]:
    """Number of files by the end of their names, which has two parts in `a.txt.gz`."""
    ends: Counter[str] = Counter()
    for file in files:
        stem, end = os.path.splitext(os.path.basename(file).lower())
        if end in _COMPRESSED:
            end = os.path.splitext(stem)[1] + end
        ends[f"{end} beside .tar" if _describes_tar(file) else end or "without an extension"] += 1
    return ends


def _refuse_mixed_parts(folder: str, files: Sequence[str]) -> None:
    """Raise UsageError where a folder holds the training and the test part of a data set, as files or as folders."""
    parts: dict[str, str] = {}
    for file in files:
        path = folder
        for name in os.path.relpath(file, folder).split(os.sep):
            part = re.split(r"[-._]", name, maxsplit=1)[0]
            if part in _PARTS:
                parts.setdefault(part, os.path.join(path, name if name == part else f"{part}{name[len(part)]}*"))
            path = os.path.join(path, name)
    if len(parts) > 1:
        raise UsageError(
            f"--input {folder}: holds {' and '.join(sorted(parts))} files, which are different parts of a data set; "
            f"name those to train on, such as '{parts.get('train', parts[max(parts)])}'"
        )


def _is_empty(file: str) -> bool:
    # A link that leads nowhere is refused when it is opened.
    return os.path.exists(file) and not os.path.getsize(file)


def _describes_tar(file: str) -> bool:
    return file.endswith(".parquet") and os.path.isfile(file.removesuffix("parquet") + "tar")


def _matching(pattern: str, *, unread: list[str]) -> Iterator[str]:
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            yield from sorted(_below(path, unread=unread))
        elif _is_input(path) or not path.endswith(".json"):
            yield path


def _below(folder: str, *, unread: list[str]) -> Iterator[str]:
    """Inputs below a folder; adds the other files that are neither hidden nor descriptions to `unread`."""

    def fail(error: OSError) -> None:
        raise UsageError(f"--input {error.filename}: cannot read ({error.strerror}); give a readable folder") from error

    for path, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = os.path.join(path, name)
            if _is_input(file):
                yield file
            elif not name.startswith(".") and not _is_description(name):
                unread.append(file)


def _is_input(path: str) -> bool:
    name = os.path.basename(path)
    lower = name.lower()
    stem, suffix = os.path.splitext(lower)
    plain = stem if suffix in _COMPRESSED else lower
    known = plain.endswith(_KINDS) or (lower.endswith(_TABLES) and _begins_as_table(path))
    return known and not name.startswith(".") and not _is_description(name)


def _is_description(name: str) -> bool:
    return name in _DESCRIPTIONS or name.endswith("_stats.json")


def _begins_as_table(path: str) -> bool:
    try:
        with open_regular(path) as stream:
            start = stream.read(8)
    except OSError:
        return False
    return start.startswith(MAGIC) or is_arrow(start)
