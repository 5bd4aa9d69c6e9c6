"""`origins.json` of a checkpoint that a conversion put together: where every tensor comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megavl.foreign.parsing import LARGE_JSON_FILE, read_json

ORIGINS = "origins.json"


def mean_origins(models: Sequence[Path], tensors: Iterable[str]) -> dict[str, Any]:
    """Content for the mean of several models.

    Args:
        models: their checkpoints or folders.
        tensors: names of all parameters.
    """
    sources = {f"model {number}": str(path.absolute()) for number, path in enumerate(models, start=1)}
    return {"sources": sources, "tensors": dict.fromkeys(tensors, _mean_of(len(models)))}


def mean_sources(checkpoint: Path) -> tuple[Path, ...]:
    """The models whose mean a checkpoint is; empty if it is none, or its file is damaged."""
    try:
        origins = read_json(checkpoint / ORIGINS, limit=LARGE_JSON_FILE)
    except (OSError, ValueError):
        return ()
    parts = [origins.get(key) if isinstance(origins, dict) else None for key in ("sources", "tensors")]
    sources, tensors = (list(part.values()) if isinstance(part, dict) else [] for part in parts)
    if not tensors or any(tensor != _mean_of(len(sources)) for tensor in tensors):
        return ()
    return tuple(Path(str(source)) for source in sources)


def _mean_of(count: int) -> str:
    return f"mean of {count} models"
