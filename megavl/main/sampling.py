"""Options that say how tokens are chosen, for `generate` and `chat`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megavl.main.bounds import require_at_least

if TYPE_CHECKING:
    from megavl.generate.sampling import Sampling


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """`--max-new-tokens`, and the fields of `Sampling`."""
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="default: %(default)s")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="draw tokens at this temperature; default: greedy"
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw from the fewest likeliest tokens whose probabilities add up to P",
    )
    parser.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="draw from the K likeliest tokens; default: all"
    )
    parser.add_argument(
        "--repetition-penalty",
        metavar="R",
        type=float,
        default=1.0,
        help="above 1, tokens already in the prompt or the answer become less likely (default: %(default)s)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the draws (default: %(default)s)")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The sampling that the options describe.

    Raises:
        UsageError: naming the option that cannot be used.
    """
    from megavl.generate.sampling import Sampling

    require_at_least(1, arguments, "max_new_tokens")
    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
