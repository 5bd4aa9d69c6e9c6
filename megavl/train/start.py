"""Refuses a start that cannot go on, before data and weights are read, which takes minutes where they are large."""

from __future__ import annotations

from pathlib import Path

from megavl.checkpoint.directory import Recovery, recover
from megavl.checkpoint.manifest import check_small_files
from megavl.checkpoint.reader import check_beside_shards, resolve
from megavl.config.errors import CheckpointError
from megavl.config.recipe import Recipe
from megavl.data.tokenizer import Tokenizer
from megavl.train.identity import Fixed, compare_resumed, compare_start
from megavl.train.progress import read_content


def check_start(recipe: Recipe, *, fingerprint: str, tokenizer: Tokenizer) -> bool:
    """Compare a recipe with the checkpoint that the run would start from; rank 0 alone does this.

    Of a checkpoint the small files are hashed. All are when the weights are loaded, and an older checkpoint that is
    then taken is compared again.

    Args:
        fingerprint: identity of the data.

    Returns:
        Whether a checkpoint fills all weights; False where the run may have to begin with random ones.

    Raises:
        UsageError: another model, tokenizer, data set or setting than the checkpoint's.
        CheckpointError: no weights to start from, or only damaged ones.
    """
    found = _own(Path(recipe.checkpoint_dir))
    if found.path is not None:
        content, fixed = read_content(found.path), Fixed.of(recipe, fingerprint=fingerprint)
        compare_resumed(recipe, found.path, content=content, fixed=fixed, tokenizer=tokenizer)
    elif found.rejected and not recipe.checkpoint.allow_fresh:
        raise CheckpointError(found.explain(Path(recipe.checkpoint_dir).absolute()))
    elif recipe.checkpoint.init is None:
        require_random_allowed(recipe)
    else:
        try:
            compare_start(recipe, resolve(recipe.checkpoint.init, skip_hash=True), tokenizer=tokenizer)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint.init: {error}") from error
    # If all files are hashed, the newest checkpoints may turn out damaged; `allow_fresh` then begins anew.
    return recipe.checkpoint.init is not None or (found.path is not None and not recipe.checkpoint.allow_fresh)


def require_random_allowed(recipe: Recipe) -> None:
    """Refuse to train from random weights, unless the recipe says so.

    Raises:
        CheckpointError: it does not.
    """
    if not recipe.checkpoint.allow_random_init:
        raise CheckpointError(
            f"no checkpoint in {recipe.checkpoint_dir} and no checkpoint.init; name the weights to start from, or set "
            "checkpoint.allow_random_init=true to train from random ones"
        )


def _own(directory: Path) -> Recovery:
    def usable(path: Path) -> None:
        check_beside_shards(path)
        check_small_files(path)

    return recover(directory, skip_hash=True, require=usable)
