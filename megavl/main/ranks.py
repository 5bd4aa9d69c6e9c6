"""Options and endings of the commands that run a model on one process or on the ranks that a launcher started."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import Literal, NoReturn

from megavl.config.errors import MegaVLError, PeerError, UsageError
from megavl.config.recipe import ParallelConfig
from megavl.foreign.printing import say, say_error
from megavl.main.bounds import require_at_least
from megavl.main.device import choose_device


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """--tensor, --pipeline and --layout."""
    parser.add_argument("--tensor", metavar="N", type=int, default=1, help="tensor-parallel ranks; start with torchrun")
    parser.add_argument("--pipeline", metavar="N", type=int, default=1, help="pipeline stages; start with torchrun")
    parser.add_argument(
        "--layout", metavar="N,N", help="decoder layers per pipeline stage; default: so that weights are spread evenly"
    )


def parallel_of(arguments: argparse.Namespace) -> ParallelConfig:
    """The layout that the options describe.

    Raises:
        UsageError: a size below 1, or a layout that is no list of numbers.
    """
    require_at_least(1, arguments, "tensor", "pipeline")
    layout: Literal["auto"] | tuple[int, ...] = "auto"
    if arguments.layout is not None:
        try:
            layout = tuple(int(part) for part in arguments.layout.split(","))
        except ValueError:
            raise UsageError(f"--layout: {arguments.layout!r} is not a list of numbers such as 2,2") from None
        if min(layout) < 0:
            raise UsageError(f"--layout: {arguments.layout} has a stage of fewer than 0 layers")
    return ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline, layout=layout)


def run_on_ranks(arguments: argparse.Namespace, action: Callable[[ParallelConfig], int]) -> int:
    """Run a command's action on this rank and return its exit code.

    With several ranks an error exits at once, because other ranks may be waiting.
    """
    parallel = parallel_of(arguments)
    choose_device(arguments.device, ranks=parallel.tensor * parallel.pipeline)
    if parallel.tensor * parallel.pipeline == 1:
        return action(parallel)
    from megavl.parallel.peers import is_communication

    rank = os.environ.get("RANK", "0")
    try:
        return action(parallel)
    except MegaVLError as error:
        _leave(error.exit_code, str(error) if rank == "0" or isinstance(error, PeerError) else "")
    except RuntimeError as error:
        if not is_communication(error):
            say(*traceback.format_exc().splitlines(), to_errors=True)
            _leave(1, "")
        _leave(PeerError.exit_code, f"rank {rank} lost a peer: {' '.join(str(error).split())[:300]}")
    except Exception:
        say(*traceback.format_exc().splitlines(), to_errors=True)
        _leave(1, "")


def is_speaker() -> bool:
    """Whether this rank prints the results."""
    return os.environ.get("RANK", "0") == "0"


def _leave(code: int, message: str) -> NoReturn:
    if message:
        say_error(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
