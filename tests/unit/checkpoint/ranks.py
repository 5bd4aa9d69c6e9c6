"""Runs a function on several real ranks over gloo: processes forked from a server that has imported torch once."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny_run import free_port

_PRELOAD = ["megavl.checkpoint.store", "megavl.checkpoint.writer", "tests.unit.checkpoint.states"]
_LIMIT_S = 1800.0


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    exit_code: int
    result: Any
    error: tuple[str, str] | None
    """Class and text of what the function raised."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, fault: str = "") -> list[Ended]:
    """Call `function(*args)` on every rank of a fresh gloo group; it returns something JSON can hold."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = free_port()
    outbox = Path(tempfile.mkdtemp(prefix="outbox-", dir=Path(args[0]).parent))
    processes = [
        context.Process(target=_rank_main, args=(function, rank, world_size, port, str(outbox), args, fault))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_LIMIT_S)
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} ranks hung"
    return [_ended(process.exitcode, outbox / f"{rank}.json") for rank, process in enumerate(processes)]


def results(ended: list[Ended]) -> list[Any]:
    """Results of ranks that all succeeded."""
    for rank, end in enumerate(ended):
        assert end.error is None and end.exit_code == 0, f"rank {rank}: {end}"
    return [end.result for end in ended]


def _ended(exit_code: int | None, path: Path) -> Ended:
    report = json.loads(path.read_text()) if path.exists() else {"result": None, "error": None}
    error = tuple(report["error"]) if report["error"] else None
    return Ended(exit_code, report["result"], error)  # type: ignore[arg-type]


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, port: int, outbox: str, args: tuple[Any, ...], fault: str
) -> None:
    import torch
    import torch.distributed as dist

    from megavl.parallel.cpu_runtime import install

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), FAULT=fault)
    torch.set_num_threads(1)
    install()
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    report: dict[str, Any] = {"result": None, "error": None}
    try:
        report["result"] = function(*args)
    except Exception as error:
        traceback.print_exc()
        report["error"] = [type(error).__name__, str(error)]
    Path(outbox, f"{rank}.json").write_text(json.dumps(report))
    if report["error"] is None:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0 if report["error"] is None else 1)
