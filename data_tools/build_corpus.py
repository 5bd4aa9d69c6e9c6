"""Builds image-text corpora: `python data_tools/build_corpus.py demo --output DIR`; README.md lists the commands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from data_tools.corpus.demo.build import build_demo, build_pictures, build_text, build_tokenizer
from data_tools.corpus.demo.picture_set import FAMILIES
from data_tools.corpus.demo.vocabulary import MIN_VOCABULARY
from data_tools.corpus.options import Parser, whole
from data_tools.corpus.pairs.commands import add_pair_commands
from data_tools.corpus.texts import DEBIAN
from megavl.config.errors import MegaVLError
from megavl.foreign.printing import say, say_error

MAX_COUNT = 1_000_000
"""Largest number of pictures, held-out questions of a kind, or vocabulary entries."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 success, 2 usage, 3 data, 5 storage)."""
    try:
        options = vars(_parser().parse_args(arguments))
        started = time.monotonic()
        counts = options.pop("build")(**options)
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; nothing was written", to_errors=True)
        return 130
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    say(f"{options['output']}: {listed} ({time.monotonic() - started:.1f} s)")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="build_corpus.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--output", type=Path, required=True, help="output folder")
    common.add_argument("--force", action="store_true", help="replace an earlier result of this program")
    common.add_argument("--seed", type=whole(0, 2**63), default=0, help="random seed (0)")

    texts = Parser(add_help=False)
    texts.add_argument("--size", type=whole(1, 10**10), default=2_500_000, help="bytes of text (2500000)")
    texts.add_argument("--debian-root", type=Path, default=DEBIAN, help=f"folder with doc/, may be absent ({DEBIAN})")

    words = Parser(add_help=False)
    words.add_argument(
        "--vocab-size", type=whole(MIN_VOCABULARY, MAX_COUNT), default=1024, help="tokenizer entries (1024)"
    )

    def command(name: str, build: Callable[..., dict[str, int]], *parents: Parser, about: str) -> Parser:
        made = commands.add_parser(name, parents=[common, *parents], help=about)
        made.set_defaults(build=build)
        return made

    command("text", build_text, texts, about="documentation, licences and docstrings of this machine")
    tokenizer = command("tokenizer", build_tokenizer, words, about="a byte-level BPE tokenizer")
    tokenizer.add_argument(
        "--input", type=Path, nargs="+", required=True, help="files of text, captions or conversations"
    )
    for name, family in FAMILIES.items():
        build = partial(build_pictures, family=name)
        pictures = command(name, build, _pictures(samples=1000), about="pictures with questions")
        pictures.add_argument("--level", choices=[*family, "all"], default="easy", help="difficulty (easy)")
    add_pair_commands(commands, common=common, texts=texts)
    demo = command("demo", build_demo, texts, words, _pictures(samples=4000), about="the whole demo corpus")
    demo.add_argument("--heldout-text", type=whole(0, 10**10), default=0, help="further bytes of held-out text (0)")
    demo.add_argument("--packages", action="store_true", help="docstrings of installed packages where text is short")
    demo.add_argument("--details", action="store_true", help="small marks too, with questions on them")
    demo.add_argument("--side", type=whole(14, 4096), help="longest side of the images (as drawn)")
    return parser


def _pictures(*, samples: int) -> Parser:
    options = Parser(add_help=False)
    number = whole(1, MAX_COUNT)
    options.add_argument("--samples", type=number, default=samples, help=f"training pictures ({samples})")
    options.add_argument("--heldout", type=number, default=40, help="held-out questions of each kind (40)")
    return options


if __name__ == "__main__":
    sys.exit(main())
