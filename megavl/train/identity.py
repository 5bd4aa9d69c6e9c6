"""Compares a recipe with the checkpoint that it starts from: what may not differ is refused, the rest is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavl.checkpoint.find import RECIPE_FILE, load_model_config
from megavl.config.errors import CheckpointError, DataError, MegaVLError, UsageError, one_line
from megavl.config.identity import Change, changes, model_changes
from megavl.config.load import read_raw, to_dict
from megavl.config.recipe import OptimizerConfig, Recipe
from megavl.data.same_tokenizer import difference
from megavl.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_in
from megavl.train.schedule import learning_rate

_SHOWN = 4
_LONGEST = 200
"""Characters of a value in a message; those of a checkpoint may be of any length."""
_PATHS = ("data.root", "data.sources", "data.tokenizer")
"""Where data lie may change; their content is compared."""
_RATE = (
    *("optimizer.lr", "optimizer.min_lr", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.milestones"),
    *("optimizer.factors", "training.steps"),
)
"""What the learning rate depends on."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Settings that must not change within a run, by the names in a checkpoint's manifest."""

    values: Mapping[str, Any]
    always: tuple[str, ...]
    """Those that `checkpoint.force_resume` cannot change either."""

    @classmethod
    def of(cls, recipe: Recipe, *, fingerprint: str) -> Fixed:
        """Those of a recipe, with the fingerprint of its data."""
        training, data = recipe.training, recipe.data
        values = {
            "seed": training.seed,
            "global_batch_size": training.global_batch_size,
            "data_fingerprint": fingerprint,
            "multimodal_fraction": data.multimodal_fraction,
            "modality_warmup_steps": data.modality_warmup_steps,
            "grouping": data.grouping,
            "cross_document_attention": data.cross_document_attention,
            "stage": training.stage,
            "trainable_parts": list(recipe.trainable_parts),
        }
        return cls(values=values, always=("trainable_parts",))


def compare_start(recipe: Recipe, path: Path, *, tokenizer: Tokenizer) -> list[str]:
    """Compare a recipe with the checkpoint of `checkpoint.init`.

    Returns:
        One line for each setting that differs and may.

    Raises:
        UsageError: another model or another tokenizer, naming key and both values.
        CheckpointError: the checkpoint contradicts itself.
    """
    lines = _compare_models(recipe, path)
    found = tokenizer_difference(path, tokenizer)
    if found is not None:
        raise UsageError(
            f"data.tokenizer: {tokenizer.path} is not the tokenizer of checkpoint.init, {path / 'tokenizer'}: {found}; "
            f"prepare the data with data.tokenizer={path / 'tokenizer'}, or name the weights that belong to the data's"
        )
    return lines


def compare_resumed(
    recipe: Recipe, path: Path, *, content: Mapping[str, Any], fixed: Fixed, tokenizer: Tokenizer
) -> list[str]:
    """Compare a recipe with a checkpoint of its own run.

    Args:
        content: facts of the manifest.

    Returns:
        One line for each setting that differs and may, or was forced.

    Raises:
        UsageError: weights without a run, another model, or another value of a fixed setting.
        CheckpointError: the checkpoint contradicts itself.
    """
    if "step" not in content:
        start = f"{recipe.checkpoint_dir.rstrip('/')}-start"
        raise UsageError(
            f"{path}: holds weights only, which no run can resume, and is in the run's own checkpoint directory; start "
            f"from it instead: mkdir -p {start} && mv {path} {start}/, and set checkpoint.init={start}"
        )
    lines = _compare_models(recipe, path)
    lines += list(_fixed_changes(recipe, path, content=content, fixed=fixed, tokenizer=tokenizer))
    return lines + list(_free_changes(recipe, path, content=content))


def tokenizer_difference(path: Path, tokenizer: Tokenizer) -> str | None:
    """How a tokenizer differs from the one inside a checkpoint; None if it does not, or the checkpoint has none."""
    folder = path / "tokenizer"
    if not folder.is_dir():
        return None
    try:
        inside = open_tokenizer(tokenizer_in(folder))
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return difference(tokenizer, inside)


def _compare_models(recipe: Recipe, path: Path) -> list[str]:
    stored = load_model_config(path)
    _check_itself(path, stored=to_dict(stored))
    conflicts, labels = model_changes(stored, recipe.model)
    if conflicts:
        raise UsageError(
            f"{path}: {_listed(conflicts)}; these weights are another model than the recipe's: set "
            f"{conflicts[0].key}={_plain(conflicts[0].old)}, or `model: {{from: init}}` to take all sizes from the "
            "checkpoint, or start from other weights in another run.dir"
        )
    return [_line(change) for change in labels if change.key != "model.preset"]


def _check_itself(path: Path, *, stored: Mapping[str, Any]) -> None:
    """Compare the two files of a checkpoint that state the model's sizes."""
    if not (path / RECIPE_FILE).is_file():
        return
    written = _recipe_of(path).get("model")
    # A version that lacked a field did not write it.
    every = changes(stored, written, at="model.") if isinstance(written, Mapping) else ()
    found = [change for change in every if change.new is not None]
    if found:
        raise CheckpointError(
            f"{path}: model.json and recipe.yaml contradict each other: {found[0].key} is {found[0].old!r} and "
            f"{found[0].new!r}; use another checkpoint"
        )


def _fixed_changes(
    recipe: Recipe, path: Path, *, content: Mapping[str, Any], fixed: Fixed, tokenizer: Tokenizer
) -> Iterator[str]:
    forced = recipe.checkpoint.force_resume
    differing = [
        Change(key=key, old=content.get(key), new=value)
        for key, value in fixed.values.items()
        if content.get(key) != value
    ]
    for change in differing:
        if change.key in fixed.always:
            raise UsageError(
                f"{path}: {_words(change)}, which cannot change within a run; resume with the old value, or start a "
                f"new run in another run.dir with checkpoint.init={path}"
            )
    other = tokenizer_difference(path, tokenizer)
    problems = [*map(_words, differing), *([f"data.tokenizer is another one: {other}"] if other else [])]
    if problems and not forced:
        raise UsageError(
            f"{path}: {'; '.join(problems)}; resume with the old values, use another checkpoint.dir, or set "
            "checkpoint.force_resume=true to go on regardless"
        )
    yield from (f"forced: {problem}" for problem in problems)


def _free_changes(recipe: Recipe, path: Path, *, content: Mapping[str, Any]) -> Iterator[str]:
    """Lines about settings in which the recipe wins."""
    if not (path / RECIPE_FILE).is_file():
        yield f"{path} holds no recipe.yaml: settings of the optimizer and the schedule are not compared"
        return
    new, old = to_dict(recipe), _recipe_of(path)
    sections = ("optimizer", "training", "data", "parallel", "recompute")
    before, after = ({name: raw.get(name) or {} for name in sections} for raw in (old, new))
    found = [change for change in changes(before, after) if not _is_elsewhere(change)]
    yield from map(_line, found)
    if any(change.key in _RATE for change in found):
        yield from _rate_lines(recipe, old=old, step=content["step"])


def _is_elsewhere(change: Change) -> bool:
    """Whether a setting is compared with the manifest, or says only where data lie."""
    name = change.key.rpartition(".")[2]
    fixed = ("seed", "global_batch_size", "stage", "train", "multimodal_fraction", "modality_warmup_steps", "grouping")
    return change.key.startswith(_PATHS) or name in (*fixed, "cross_document_attention")


def _rate_lines(recipe: Recipe, *, old: Mapping[str, Any], step: int) -> Iterator[str]:
    if step >= recipe.training.steps:
        return
    try:
        settings, steps = OptimizerConfig(**old["optimizer"]), int(old["training"]["steps"])
    except (KeyError, TypeError, ValueError):
        yield "the learning rate of the run so far is not known: its recipe.yaml is of another version"
        return
    before = learning_rate(settings, step=max(1, step), steps=steps)
    after = learning_rate(recipe.optimizer, step=step + 1, steps=recipe.training.steps)
    verb = "goes on" if abs(after - before) <= 0.1 * max(after, before) else "jumps"
    yield f"the learning rate {verb} from {before:.2e} at step {step} to {after:.2e} at step {step + 1}"


def _recipe_of(path: Path) -> dict[str, Any]:
    try:
        return read_raw(path / RECIPE_FILE)
    except MegaVLError as error:
        raise CheckpointError(one_line(error, limit=300)) from error


def _listed(found: list[Change]) -> str:
    more = [f"{len(found) - _SHOWN} more settings differ"] if len(found) > _SHOWN else []
    return "; ".join([*map(_words, found[:_SHOWN]), *more])


def _words(change: Change) -> str:
    return f"{change.key} is {_plain(change.old)} in the checkpoint and {_plain(change.new)} in the recipe"


def _line(change: Change) -> str:
    return f"{change.key}: {_plain(change.old)} before, {_plain(change.new)} now, as the recipe says"


def _plain(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)[:_LONGEST]
