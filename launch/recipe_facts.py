"""Prints what the launch scripts need of a recipe: run directory, checkpoint directory, ranks of one model copy.

Usage: python -m launch.recipe_facts RECIPE [key.path=value ...]
"""

from __future__ import annotations

import sys

from megavl.config.errors import MegaVLError, UsageError
from megavl.config.load import load_recipe
from megavl.config.recipe import Recipe


def main(arguments: list[str]) -> int:
    """Print the facts, or one message and the exit code of the mistake."""
    try:
        recipe = load_recipe(arguments[0], overrides=arguments[1:])
        _check_root(recipe, given=any(argument.startswith("data.root=") for argument in arguments[1:]))
    except MegaVLError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_code
    print(recipe.run.dir)
    print(recipe.checkpoint_dir)
    print(recipe.parallel.tensor * recipe.parallel.pipeline)
    return 0


def _check_root(recipe: Recipe, *, given: bool) -> None:
    """Refuse a DATA that would have no effect."""
    if given and all(source.path is not None for source in recipe.data.sources):
        raise UsageError("DATA: every entry of the recipe's data.sources has a path of its own; unset DATA")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
