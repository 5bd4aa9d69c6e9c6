"""The `megavl` command: runs a subcommand and turns a user's mistake into one message and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence

import megavl.config.releases  # noqa: F401  # before megatron-core
from megavl.config.errors import MegaVLError, UsageError
from megavl.config.expected_warnings import ignore_expected_warnings
from megavl.foreign.printing import VisibleFormatter, VisibleParser, say_error

_COMMANDS = {
    "train": "train one stage; run under torchrun or srun; resumes by itself",
    "plan": "layers, memory, FLOPs and bubble of a layout",
    "convert": "Hugging Face folders to MegaVL checkpoints and back",
    "push": "upload an exported folder to the Hugging Face Hub",
    "generate": "answer prompts about images",
    "chat": "talk with a model about images",
    "evaluate": "score a model on task files, public benchmarks, or tasks of a harness",
    "serve": "an OpenAI-compatible server, and a chat page",
    "judge": "which of two models answers better, by a judge at an endpoint",
    "rate": "let people rate the answers of several models, blindly",
    "inspect": "what a checkpoint holds, verified",
}
"""Subcommands; each is a module of megavl.main with `add_arguments(parser)` and `run(arguments) -> int`."""
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")
"""How `key.path=value` begins."""
_NO_OPTION = re.compile(r"[^-]")
"""How a word begins that is no option."""


class _Parser(VisibleParser):
    """Names the nearest choice where one is misspelt; subparsers are of this class too."""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices or ()], n=1)
            if not near:
                raise
            raise argparse.ArgumentError(action, f"{error.message}; did you mean {near[0]}?") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 2 usage or recipe, 3 data, 4 checkpoint, 5 storage, 6 numerics, 7 peer lost, 75 pre-empted and saved,
        130 ended by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    ignore_expected_warnings()
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter())
    parser = _Parser(prog="megavl", description="Train DeepSeek-VL with 3D parallelism.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in arguments if word in _COMMANDS), None)
    runs = {}
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        # Only the wanted command is imported: `plan` and `--help` need no torch.
        if name == wanted:
            module = importlib.import_module(f"megavl.main.{name}")
            module.add_arguments(sub)
            runs[name] = module.run
    parsed, rest = parser.parse_known_args(arguments)
    # argparse leaves words over that come after an option: overrides of a recipe, or task files.
    name, fits = ("overrides", _OVERRIDE) if "overrides" in parsed else ("tasks", _NO_OPTION)
    if name not in parsed or not all(map(fits.match, rest)):
        parsed = parser.parse_args(arguments)
    else:
        setattr(parsed, name, [*getattr(parsed, name), *rest])
    try:
        return int(runs[parsed.command](parsed))
    except MegaVLError as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, UsageError):
            say_error(error)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
