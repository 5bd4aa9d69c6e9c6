"""`megavl serve MODEL [--port N]`: an OpenAI-compatible server, and a chat page."""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megavl.config.errors import UsageError
from megavl.config.recipe import ParallelConfig
from megavl.foreign.printing import say
from megavl.main.bounds import require_at_least
from megavl.main.device import add_device_arguments
from megavl.main.ranks import add_rank_arguments, is_speaker, run_on_ranks

if TYPE_CHECKING:
    import socket

    from megavl.config.model import ModelConfig
    from megavl.serve.limits import Limits
    from megavl.serve.server import Address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="MegaVL checkpoint, directory of checkpoints, or HF folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, for this machine only)"
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=8000, help="0 takes any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a further name of this host; may be repeated"
    )
    parser.add_argument("--name", help="how clients call the model; default: the name of its folder")
    parser.add_argument("--system", metavar="TEXT", help="system text of chats without one; default: the model's own")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="answers in progress at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--waiting",
        metavar="N",
        type=int,
        default=64,
        help="requests that may wait beyond these (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        help="of a prompt with its answer; default: at most 4096",
    )
    parser.add_argument(
        "--max-images", metavar="N", type=int, default=8, help="images of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-body", metavar="MIB", type=int, default=20, help="size of a request in MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--max-seconds", metavar="S", type=float, default=600.0, help="time of a request (default: %(default)s)"
    )
    add_rank_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; 0 after SIGTERM, 130 after Ctrl-C."""
    require_at_least(1, arguments, "batch_size", "max_tokens", "max_body")
    require_at_least(0, arguments, "waiting", "max_images")
    if not 0 < arguments.max_seconds < float("inf"):
        raise UsageError(f"--max-seconds: {arguments.max_seconds} is no time; give a positive number")
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port: {arguments.port} is no port; give 1 to 65535, or 0 for any free one")
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(f"megavl serve: {' and '.join(missing)} not installed; pip install 'megavl[serve]'")
    return run_on_ranks(arguments, partial(_serve, arguments))


def _serve(arguments: argparse.Namespace, parallel: ParallelConfig) -> int:
    """Take the port before the weights are read, then serve."""
    from megavl.checkpoint import collective_errors
    from megavl.generate.open_model import check_layout, find_model_on_every_rank, load_stage, world
    from megavl.generate.pretrained import Model, Processor
    from megavl.serve.server import Address, serve

    address = Address(host=arguments.host, port=arguments.port, names=tuple(arguments.allow_host))
    opened: list[socket.socket] = []
    with world(parallel):
        collective_errors.on_rank_zero(lambda: opened.append(_listener(address)))
        source = find_model_on_every_rank(arguments.model)
        check_layout(source.config, parallel)
        limits = _limits(arguments, source.config)
        stage = load_stage(source, dtype=arguments.dtype, parallel=parallel)
        return serve(
            Model(stage, Processor(source.config, source.tokenizer)),
            name=arguments.name or Path(arguments.model).resolve().name,
            limits=limits,
            listener=opened[0] if is_speaker() else None,
            guard=address.guard(),
            system=arguments.system,
        )


def _listener(address: Address) -> socket.socket:
    if not address.is_loopback:
        say(
            f"warning: --host {address.host}: whoever reaches this machine can use the model, for the server has no "
            "passwords",
            to_errors=True,
        )
    return address.open()


def _limits(arguments: argparse.Namespace, config: ModelConfig) -> Limits:
    from megavl.serve.limits import TOKENS, Limits

    positions = config.llm.max_position_embeddings
    if (arguments.max_tokens or 0) > positions:
        raise UsageError(f"--max-tokens: {arguments.max_tokens} exceeds the model's {positions} positions; lower it")
    return Limits(
        tokens=arguments.max_tokens or min(TOKENS, positions),
        rows=arguments.batch_size,
        waiting=arguments.waiting,
        body=arguments.max_body << 20,
        images=arguments.max_images,
        seconds=arguments.max_seconds,
    )
