"""What a checkpoint and the run that wrote it say about how the model was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from megavl.checkpoint.find import RECIPE_FILE, START, find
from megavl.checkpoint.manifest import check_sizes, read_manifest
from megavl.config.errors import CheckpointError
from megavl.convert.origins import ORIGINS, mean_sources
from megavl.foreign.parsing import parse_json
from megavl.foreign.reading import open_regular
from megavl.foreign.yaml_text import read_yaml

_LONGEST_ROW = 1 << 20
"""Bytes of a row of a run's logs."""
_SAME_RUN = ("run.dir", "checkpoint.dir", "training.stage", "training.seed")
"""Settings by which the recipe in a run's folder and that in a checkpoint are of one run; others may change in it."""
_STAGES = 16
"""Most runs that are followed back from one to the one that it started from."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A data source and its part of the sequences of one run."""

    name: str
    """As in the recipe; for a source without a name, its folder without those above it."""
    text: float
    """Of the text sequences, 0 to 1."""
    multimodal: float
    """Of the multimodal sequences, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One run, up to the checkpoint that the model or the next run took."""

    checkpoint: Path
    step: int
    recipe: Mapping[str, Any]
    """As the run resolved it."""
    trained: tuple[str, ...]
    """Parts of the model that were trained."""
    sequences: int
    tokens: int | None
    """Tokens of all sequences; None if the run's `metrics.jsonl` is not there or lacks steps."""
    images: int | None
    multimodal_fraction: float
    shares: tuple[Share, ...]
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Last row of the run's `evaluation.jsonl` up to `step`; empty without one."""

    def setting(self, key: str) -> Any:
        """Value of a dotted key of the recipe; None if it is not there."""
        return _setting(self.recipe, key)


def _setting(recipe: Mapping[str, Any], key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The runs that made a model, first one first."""

    stages: tuple[StageFacts, ...]
    origin: str
    """Where the weights came from before the first of them."""
    mean: tuple[str, ...] = ()
    """Names of the models whose mean this one is; `stages` are then those of the newest that has some."""


def run_facts(checkpoint: Path) -> RunFacts:
    """Follow a checkpoint back through the runs that led to it, as far as their checkpoints are still there.

    Args:
        checkpoint: a verified checkpoint directory.

    Raises:
        CheckpointError: the checkpoint's recipe cannot be read.
    """
    stages: list[StageFacts] = []
    models = _averaged(checkpoint)
    current: Path | None = _newest_trained(models) or checkpoint
    origin = "unknown"
    while current is not None and len(stages) < _STAGES:
        if RECIPE_FILE not in read_manifest(current)["files"]:
            means = ", ".join(map(_shown, _averaged(current)))
            made = f"the mean of {means}" if means else "converted or put together before training"
            origin = f"the checkpoint {_shown(current)}, {made}"
            break
        stages.append(_stage(current))
        start = _start(stages[-1])
        if start is None:
            origin = "random weights"
            break
        current = start.find()
        if current is None:
            origin = f"the checkpoint {_shown(start.path)}, which is not found from here"
    return RunFacts(stages=tuple(reversed(stages)), origin=origin, mean=tuple(map(_shown, models)))


def _averaged(checkpoint: Path) -> tuple[Path, ...]:
    return mean_sources(checkpoint) if ORIGINS in read_manifest(checkpoint)["files"] else ()


def _newest_trained(models: Sequence[Path]) -> Path | None:
    """The model of the latest step, of those that a run wrote and that are still there."""
    found = []
    for number, path in enumerate(models):
        with contextlib.suppress(CheckpointError):
            manifest = check_sizes(path)
            if RECIPE_FILE in manifest["files"]:
                found.append((manifest["iteration"], number))
    return models[max(found)[1]] if found else None


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The checkpoint that a run started from."""

    path: Path
    """As the run found it; for an old checkpoint, `checkpoint.init` of the recipe."""
    init: Path | None
    """`checkpoint.init` of the recipe."""
    digest: str | None
    """Of its manifest; None for an old checkpoint."""

    def find(self) -> Path | None:
        """The very checkpoint, also where its folder was moved and `checkpoint.init` names the new path."""
        if self.digest is None:
            try:
                return find(self.path, skip_hash=True, require=read_manifest)
            except CheckpointError:
                return None
        for path in (self.path, *([self.init, self.init / self.path.name] if self.init else [])):
            with contextlib.suppress(CheckpointError):
                if check_sizes(path)["digest"] == self.digest:
                    return path
        return None


def _start(stage: StageFacts) -> _Start | None:
    """None if a run began with random weights."""
    init, content = stage.setting("checkpoint.init"), read_manifest(stage.checkpoint)["content"]
    init = Path(init) if isinstance(init, str) else None
    start = content.get(START, {})
    if start is None:
        return None
    path, digest = (start.get(key) if isinstance(start, dict) else None for key in ("checkpoint", "digest"))
    if isinstance(path, str) and isinstance(digest, str):
        return _Start(path=Path(path), init=init, digest=digest)
    return None if init is None else _Start(path=init, init=init, digest=None)


def _shown(checkpoint: Path) -> str:
    """Name of the run and of the iteration; the folders above them say nothing about the model."""
    names = [name for name in checkpoint.parts if name != "checkpoints"] or [checkpoint.name]
    return str(Path(*names[-2:])) if names[-1].startswith("iter_") else names[-1]


def _stage(path: Path) -> StageFacts:
    try:
        recipe = read_yaml(path / RECIPE_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / RECIPE_FILE}: not readable ({error})") from error
    content = read_manifest(path)["content"]
    if not isinstance(recipe, dict) or not _is_count(content.get("step")):
        raise CheckpointError(f"{path}: its recipe or its step is damaged; use another checkpoint")
    step, trained = content["step"], content.get("trainable_parts")
    run = _run_folder(path, recipe)
    rows, evaluations = (
        [row for row in _rows(run / name) if _is_count(row.get("step")) and row["step"] <= step] if run else []
        for name in ("metrics.jsonl", "evaluation.jsonl")
    )
    whole = len({row["step"] for row in rows}) == step
    fraction = content.get("multimodal_fraction")
    return StageFacts(
        checkpoint=path,
        step=step,
        recipe=recipe,
        trained=tuple(map(str, trained)) if isinstance(trained, list) else (),
        sequences=content["consumed_samples"] if _is_count(content.get("consumed_samples")) else 0,
        tokens=_total(rows, "tokens") if whole else None,
        images=_total(rows, "images") if whole else None,
        multimodal_fraction=float(fraction) if isinstance(fraction, (int, float)) else 0.0,
        shares=tuple(_shares(recipe)),
        evaluation=evaluations[-1] if evaluations else {},
    )


def _run_folder(checkpoint: Path, recipe: Mapping[str, Any]) -> Path | None:
    """The folder of the run that wrote a checkpoint, known by its recipe: that around its checkpoints, or `run.dir`."""
    named = _setting(recipe, "run.dir")
    for folder in (checkpoint.absolute().parent.parent, *([Path(named)] if isinstance(named, str) else [])):
        try:
            other = read_yaml(folder / RECIPE_FILE)
        except (OSError, ValueError):
            continue
        if isinstance(other, dict) and all(_setting(other, key) == _setting(recipe, key) for key in _SAME_RUN):
            return folder
    return None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a log; a line that is no row, such as one that a kill tore, is left out."""
    try:
        stream = open_regular(path, buffered=True)
    except (OSError, ValueError):
        return
    with stream:
        while line := stream.readline(_LONGEST_ROW):
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _shares(recipe: Mapping[str, Any]) -> Iterator[Share]:
    data = recipe.get("data")
    sources = data.get("sources") if isinstance(data, Mapping) else None
    found = [
        (str(source.get("name") or Path(str(source.get("path"))).name), weight)
        for source in (sources if isinstance(sources, list) else ())
        if isinstance(source, Mapping) and isinstance(weight := source.get("weight"), Mapping)
    ]
    totals = {key: sum(_number(weight.get(key)) for _, weight in found) for key in ("text", "multimodal")}
    for name, weight in found:
        parts = {key: _number(weight.get(key)) / total if total else 0.0 for key, total in totals.items()}
        if any(parts.values()):
            yield Share(name=name, **parts)


def _total(rows: list[dict[str, Any]], key: str) -> int | None:
    values = {row["step"]: row.get(key) for row in rows}
    counts = [value for value in values.values() if _is_count(value)]
    return sum(counts) if len(counts) == len(values) else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and value >= 0 else 0.0
