"""What ablations read from outside their cache, by content: a path alone would hide that other data stand there now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megavl.checkpoint.directory import candidates
from megavl.config.errors import DataError
from megavl.config.evaluation import benchmark_of
from megavl.config.recipe import Recipe
from megavl.files.hashing import file_sha256

_MANIFEST = "manifest.json"
"""Of data sets and checkpoints; it has the hashes of all other files."""


def paths_of(recipe: Recipe) -> list[str]:
    """Every path that a run reads: data, tokenizer, evaluation data and checkpoint."""
    evaluation = recipe.evaluation
    found = [
        *(source.path for source in recipe.data.mixture),
        recipe.data.tokenizer,
        *(benchmark_of(entry)[1] for entry in evaluation.tasks),
        *evaluation.held_out,
        recipe.checkpoint.init,
    ]
    return [path for path in found if path]


def contents(paths: Iterable[str]) -> dict[str, str]:
    """Hash by path of a file, data set, checkpoint or tokenizer; what is not there has none.

    Raises:
        DataError: it is there and cannot be read.
    """
    found: dict[str, str] = {}
    for path in sorted(set(paths)):
        try:
            files = _files(Path(path))
            if files:
                texts = [f"{file.name} {file_sha256(file)}" for file in files]
                found[path] = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); make it readable, or name another path") from error
    return found


def _files(path: Path) -> list[Path]:
    """Files whose content tells one thing from another."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    for folder in (path, *candidates(path)[:1]):
        if (folder / _MANIFEST).is_file():
            return [folder / _MANIFEST]
    # A tokenizer.
    return sorted(file for file in path.glob("*.json") if file.is_file())
