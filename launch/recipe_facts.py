"""Reads the settings of a launch script and its recipe, before anything is started or submitted.

Usage: [TP=..] [PP=..] [DATA=..] [TOKENIZER=..] [INIT=..] [RUN_DIR=..] [EXTRA=..] python -m launch.recipe_facts RECIPE

Prints, each followed by a NUL: run directory, checkpoint directory, ranks of one model copy, the number of paths that
the ranks read, these paths, and every override.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping

if sys.version_info < (3, 10):  # noqa: UP036  (where the ranks run in a container, this interpreter may be the system's)
    print(
        f"launch: PYTHON: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, too old to read the "
        "recipe; name Python 3.10 or newer, such as PYTHON=python3.11",
        file=sys.stderr,
    )
    sys.exit(2)

try:
    import yaml

    from megavl.checkpoint.find import stored_model
    from megavl.config.errors import MegaVLError, UsageError
    from megavl.config.load import load_recipe, recipe_files
    from megavl.config.recipe import Recipe
    from megavl.foreign.printing import say
except ImportError as error:
    print(
        f"launch: PYTHON: {sys.executable} cannot read the recipe, because it lacks {error.name}; run `make setup`, or "
        "install what reads it: python3 -m pip install pydantic pyyaml",
        file=sys.stderr,
    )
    sys.exit(2)

_NUMBERS = {"TP": "parallel.tensor", "PP": "parallel.pipeline"}
_TEXTS = {"DATA": "data.root", "TOKENIZER": "data.tokenizer", "INIT": "checkpoint.init", "RUN_DIR": "run.dir"}
_PLAIN = re.compile(r"/[\w./+-]*", re.ASCII)
"""Paths that YAML reads as they stand."""
_QUOTED = r"'(?:[^']|'')*'" + r"|" + r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(rf"(?P<quoted>(?<=[=\[{{,:\s])(?:{_QUOTED}))|(?P<blank>\s+)|(?P<other>.)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Print the facts, or one message and the exit code of the mistake."""
    try:
        overrides = overrides_from(os.environ)
        recipe = load_recipe(arguments[0], overrides=overrides, stored_model=stored_model)
        _check_root(recipe, given=bool(os.environ.get("DATA")))
    except MegaVLError as error:
        say(f"launch: {error}", to_errors=True)
        return error.exit_code
    ranks = recipe.parallel.tensor * recipe.parallel.pipeline
    read = [str(path) for path in (*recipe_files(arguments[0]), *_inputs(recipe))]
    for fact in (recipe.run.dir, recipe.checkpoint_dir, ranks, len(read), *read, *overrides):
        sys.stdout.write(f"{fact}\0")
    return 0


def overrides_from(settings: Mapping[str, str]) -> list[str]:
    """Settings as overrides of the recipe, those of EXTRA last so that they win.

    Raises:
        UsageError: a setting that is no number or no valid text.
    """
    given = {name: settings[name] for name in (*_NUMBERS, *_TEXTS, "EXTRA") if settings.get(name)}
    for name, value in given.items():
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"{name}: {value!r} is not valid UTF-8; use another path")
        if name in _NUMBERS and not re.fullmatch(r"[1-9]\d*", value, re.ASCII):
            raise UsageError(f"{name}: {value!r} is no number of ranks; give a whole number such as 2")
    numbers = [f"{key}={given[name]}" for name, key in _NUMBERS.items() if name in given]
    texts = [f"{key}={_yaml(given[name], always=name == 'DATA')}" for name, key in _TEXTS.items() if name in given]
    return [*numbers, *texts, *split_extra(given.get("EXTRA", ""))]


def split_extra(text: str) -> list[str]:
    """The overrides of EXTRA: blanks divide them, except inside of quotes and brackets, as YAML reads both."""
    found, depth = [""], 0
    for token in _TOKEN.finditer(text):
        if token["other"]:
            depth += (token["other"] in "[{") - (token["other"] in "]}")
        if token["blank"] and depth <= 0:
            found.append("")
        else:
            found[-1] += token[0]
    return [override for override in found if override]


def _yaml(text: str, *, always: bool) -> str:
    """YAML that is read as this text, quoted where it must be or `always`."""
    if _PLAIN.fullmatch(text) and not always:
        return text
    quoted: str = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=sys.maxsize)
    return quoted.rstrip("\n")


def _inputs(recipe: Recipe) -> Iterator[str]:
    """What a run reads besides its recipe: start weights, tokenizer and data."""
    paths = (recipe.checkpoint.init, recipe.data.tokenizer, recipe.data.root)
    yield from filter(None, (*paths, *(source.path for source in recipe.data.sources)))


def _check_root(recipe: Recipe, *, given: bool) -> None:
    """Refuse a DATA that would have no effect."""
    if given and all(source.path is not None for source in recipe.data.sources):
        raise UsageError("DATA: every entry of the recipe's data.sources has a path of its own; unset DATA")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
