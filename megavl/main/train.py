"""`megavl train RECIPE [key.path=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from typing import NoReturn

from megavl.config.errors import EXIT_PREEMPTED, MegaVLError, PeerError, UsageError
from megavl.config.load import read_raw
from megavl.main.open_recipe import open_recipe
from megavl.planner.layouts.check import checked_scenario
from megavl.train.supervise.exit_status import ExitStatus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of one stage, e.g. launch/recipes/7b/stage2.yaml")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="laid over the recipe")


def run(arguments: argparse.Namespace) -> int:
    """Train; every ending is recorded in `<run>/exit_status.json`.

    An error leaves with `os._exit`: peers may be gone or waiting in a collective, and an orderly interpreter exit
    would wait for them or abort.
    """
    # Usually set by the launcher; a value that is no number is refused by `groups`, with a better message.
    world = os.environ.get("WORLD_SIZE", "1")
    devices = int(world) if world.isdigit() else None
    # What cannot work is refused before torch and megatron-core are imported, which takes seconds; whether the device
    # has the memory is known only with torch.
    try:
        recipe = open_recipe(arguments.recipe, overrides=arguments.overrides, devices=devices)
        checked_scenario(recipe, devices=devices, device=None)
    except UsageError as error:
        return _refuse(_run_dir(arguments), error)
    from megavl.parallel.groups import rank_from_env
    from megavl.parallel.peers import is_communication
    from megavl.train.loop import train
    from megavl.train.supervise.watchdog import Watchdog

    rank = rank_from_env()
    status = ExitStatus(recipe.run.dir, rank=rank)
    if rank == 0:
        status.clear()
    watcher = Watchdog(status, timeout_s=recipe.parallel.timeout_s, leave=partial(_leave, status))
    watcher.start()
    try:
        code = train(recipe, status=status)
    except MegaVLError as error:
        _leave(status, error.exit_code, str(error))
    except RuntimeError as error:
        if not is_communication(error):
            _leave_with_traceback(status, error)
        first = " ".join(str(error).split())[:300]
        _leave(
            status,
            PeerError.exit_code,
            f"rank {rank} lost a peer at step {status.step} while {status.section}: {first}",
        )
    except Exception as error:
        _leave_with_traceback(status, error)
    watcher.stop()
    if rank == 0:
        status.write(code, "pre-empted and saved" if code == EXIT_PREEMPTED else "finished")
    return code


def _run_dir(arguments: argparse.Namespace) -> str | None:
    """Where a recipe that cannot be opened says that its run goes; None where it does not say."""
    try:
        run = read_raw(arguments.recipe, overrides=arguments.overrides).get("run")
    except UsageError:
        return None
    found = run.get("dir") if isinstance(run, Mapping) else None
    return found if isinstance(found, str) else None


def _refuse(run_dir: str | None, error: UsageError) -> int:
    """Every rank comes to the same conclusion, so one speaks for all; an earlier run's status must not stand.

    Where there is no status a run may be under way, whose ranks would take this one for its end. So it is written there
    only under a launcher, which hides the exit code; who typed the command sees it.
    """
    if os.environ.get("RANK", "0") != "0":
        return error.exit_code
    if run_dir is not None:
        status = ExitStatus(run_dir, rank=0)
        with contextlib.suppress(OSError):
            if "RANK" in os.environ or status.path.exists():
                status.clear()
                status.write(error.exit_code, str(error))
    raise error


def _leave_with_traceback(status: ExitStatus, error: BaseException) -> NoReturn:
    """A defect of MegaVL: the traceback is the message, and peers learn of it from the status."""
    traceback.print_exc()
    _leave(status, 1, f"{type(error).__name__}: {error}")


def _leave(status: ExitStatus, code: int, reason: str) -> NoReturn:
    try:
        first = status.write(code, reason)
    except OSError:
        first = True
    if first:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
