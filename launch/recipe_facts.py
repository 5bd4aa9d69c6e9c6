"""What the launch scripts ask of a recipe, a line each: run directory, checkpoint directory, ranks of one model copy.

Usage: python -m launch.recipe_facts RECIPE [key.path=value ...]
"""

from __future__ import annotations

import sys

from megavl.config.errors import MegaVLError
from megavl.config.load import load_recipe


def main(arguments: list[str]) -> int:
    """Print the facts, or one message and the exit code of the mistake."""
    try:
        recipe = load_recipe(arguments[0], overrides=arguments[1:])
    except MegaVLError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_code
    print(recipe.run.dir)
    print(recipe.checkpoint_dir)
    print(recipe.parallel.tensor * recipe.parallel.pipeline)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
