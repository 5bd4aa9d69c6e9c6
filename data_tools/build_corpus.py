"""Builds image-text corpora: `python data_tools/build_corpus.py demo --output DIR`; README.md lists the commands."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data_tools.corpus.demo.build import build_demo, build_pictures, build_text, build_tokenizer
from data_tools.corpus.demo.picture_set import FAMILIES
from data_tools.corpus.demo.vocabulary import MIN_VOCABULARY
from data_tools.corpus.number_option import whole
from data_tools.corpus.pairs.commands import PAIR_COMMANDS, add_pair_commands, run_pairs
from data_tools.corpus.texts import DEBIAN
from megavl.config.errors import MegaVLError, UsageError

MAX_COUNT = 1_000_000
"""Largest number of pictures, held-out questions of a kind, or vocabulary entries."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other error: one message and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 success, 2 usage, 3 data, 5 storage)."""
    try:
        options = _parser().parse_args(arguments)
        started = time.monotonic()
        counts = _run(options)
    except MegaVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{options.output}: {listed} ({time.monotonic() - started:.1f} s)")
    return 0


def _run(options: argparse.Namespace) -> dict[str, int]:
    if options.command == "tokenizer":
        return build_tokenizer(options.output, inputs=options.input, vocab_size=options.vocab_size, force=options.force)
    if options.command == "text":
        return build_text(
            options.output, seed=options.seed, size=options.size, debian=options.debian_root, force=options.force
        )
    if options.command == "demo":
        return build_demo(
            options.output,
            seed=options.seed,
            samples=options.samples,
            heldout=options.heldout,
            size=options.size,
            vocab_size=options.vocab_size,
            debian=options.debian_root,
            force=options.force,
        )
    if options.command in PAIR_COMMANDS:
        return run_pairs(options)
    family = FAMILIES[options.command]
    return build_pictures(
        options.output,
        family=options.command,
        levels=list(family) if options.level == "all" else [options.level],
        seed=options.seed,
        samples=options.samples,
        heldout=options.heldout,
        force=options.force,
    )


def _parser() -> _Parser:
    parser = _Parser(prog="build_corpus.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--output", type=Path, required=True, help="output folder")
    common.add_argument("--force", action="store_true", help="replace an earlier result of this program")
    common.add_argument("--seed", type=whole(0, 2**63), default=0, help="random seed (0)")

    texts = _Parser(add_help=False)
    texts.add_argument("--size", type=whole(1, 10**10), default=2_500_000, help="bytes of text (2500000)")
    texts.add_argument("--debian-root", type=Path, default=DEBIAN, help=f"folder with doc/, may be absent ({DEBIAN})")

    words = _Parser(add_help=False)
    words.add_argument(
        "--vocab-size", type=whole(MIN_VOCABULARY, MAX_COUNT), default=1024, help="tokenizer entries (1024)"
    )

    commands.add_parser("text", parents=[common, texts], help="documentation, licences and docstrings of this machine")
    tokenizer = commands.add_parser("tokenizer", parents=[common, words], help="a byte-level BPE tokenizer")
    tokenizer.add_argument("--input", type=Path, nargs="+", required=True, help="text.jsonl, captions, conversations")
    for name, family in FAMILIES.items():
        command = commands.add_parser(name, parents=[common, _pictures(samples=1000)], help="pictures with questions")
        command.add_argument("--level", choices=[*family, "all"], default="easy", help="difficulty (easy)")
    add_pair_commands(commands, common=common, texts=texts)
    commands.add_parser("demo", parents=[common, texts, words, _pictures(samples=4000)], help="the whole demo corpus")
    return parser


def _pictures(*, samples: int) -> _Parser:
    options = _Parser(add_help=False)
    number = whole(1, MAX_COUNT)
    options.add_argument("--samples", type=number, default=samples, help=f"training pictures ({samples})")
    options.add_argument("--heldout", type=number, default=40, help="held-out questions of each kind (40)")
    return options


if __name__ == "__main__":
    sys.exit(main())
