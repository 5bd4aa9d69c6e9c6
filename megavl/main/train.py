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

from megavl.config.errors import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    CheckpointError,
    MegaVLError,
    PeerError,
    StorageError,
    UsageError,
)
from megavl.config.load import read_raw
from megavl.foreign.printing import say, say_error
from megavl.main.open_recipe import add_recipe_arguments, open_recipe
from megavl.planner.layouts.check import checked_scenario
from megavl.train.supervise.exit_status import ExitStatus

_ENDS = {0: "finished", EXIT_PREEMPTED: "pre-empted and saved", EXIT_INTERRUPTED: "interrupted and saved"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_recipe_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train; `<run>/exit_status.json` records how the run ended.

    After an error the process leaves with `os._exit`. Peers may be gone or waiting in a collective, for which a normal
    exit of the interpreter would wait.
    """
    # A value that is no number is refused by `groups`, with a better message.
    world = os.environ.get("WORLD_SIZE", "1")
    devices = int(world) if world.isdigit() else None
    # Sizes are checked before importing torch and megatron-core, which takes seconds. Memory is checked later, since
    # only torch knows the device.
    try:
        recipe = open_recipe(arguments.recipe, overrides=arguments.overrides, devices=devices)
        scenario = checked_scenario(recipe, devices=devices, device=None)
    except (UsageError, CheckpointError) as error:
        return _refuse(_run_dir(arguments), error)
    from megavl.parallel.first_import import import_engine

    import_engine()
    from megavl.parallel.groups import rank_from_env
    from megavl.parallel.peers import is_communication
    from megavl.train.loop import train
    from megavl.train.supervise import patient_streams
    from megavl.train.supervise.claim import RunClaim
    from megavl.train.supervise.launcher import find_launcher
    from megavl.train.supervise.roll_call import RollCall
    from megavl.train.supervise.signals import StopFlag
    from megavl.train.supervise.watchdog import Watchdog
    from megavl.train.trackers import leave_past_services

    patient_streams.install()
    rank, launcher = rank_from_env(), find_launcher()
    status = ExitStatus(recipe.run.dir, rank=rank, claim=RunClaim(recipe.run.dir, launcher=launcher))
    leave = partial(_leave, status)
    if rank == 0:
        status.claim.take(recipe, on_lost=lambda error: leave(error.exit_code, str(error)))
    stop = StopFlag()
    stop.watch_interrupts()
    timeout_s = recipe.parallel.timeout_s
    roll_call = RollCall(status, timeout_s=timeout_s)
    watchdog = Watchdog(status, timeout_s=timeout_s, leave=leave, launcher=launcher, stop=stop, roll_call=roll_call)
    watchdog.start()
    try:
        if rank == 0 and status.claim.refusal is None:
            status.clear()
        code = train(scenario, status=status, stop=stop, roll_call=roll_call)
    except MegaVLError as error:
        # If the others are not there to be told, the refusal is still the cause.
        cause = status.claim.refusal or error
        _leave(status, cause.exit_code, str(cause))
    except RuntimeError as error:
        if not is_communication(error):
            _leave_with_traceback(status, error)
        first = " ".join(str(error).split())[:300]
        _leave(
            status,
            PeerError.exit_code,
            f"rank {rank} lost a peer at step {status.step} while {status.section}{roll_call.missing()}: {first}",
        )
    except Exception as error:
        _leave_with_traceback(status, error)
    watchdog.stop()
    if rank == 0:
        status.write(code, _ENDS[code])
        status.claim.release()
        if status.failed and code == 0:
            code = StorageError.exit_code
    leave_past_services(code)
    return code


def _run_dir(arguments: argparse.Namespace) -> str | None:
    """`run.dir` of a recipe that cannot be opened; None if it cannot be read either."""
    try:
        run = read_raw(arguments.recipe, overrides=arguments.overrides).get("run")
    except UsageError:
        return None
    found = run.get("dir") if isinstance(run, Mapping) else None
    return found if isinstance(found, str) else None


def _refuse(run_dir: str | None, error: MegaVLError) -> int:
    """Report a recipe that cannot run, on rank 0 alone: every rank finds the same.

    The exit status is written if the folder has one, which an earlier run left, or under a launcher, which hides exit
    codes. Otherwise a run may be under way there, and its ranks would take the status for the end of their run.
    """
    if os.environ.get("RANK", "0") != "0":
        return error.exit_code
    status = ExitStatus(run_dir or ".", rank=0)
    with contextlib.suppress(OSError, StorageError):
        status.write_copy(error.exit_code, str(error))
    with contextlib.suppress(OSError, StorageError):
        has_status = "RANK" in os.environ or status.path.exists()
        if run_dir is not None and status.claim.permits_status() and has_status:
            status.clear()
            status.write(error.exit_code, str(error))
    raise error


def _leave_with_traceback(status: ExitStatus, error: BaseException) -> NoReturn:
    """Leave after a defect of MegaVL: print the traceback; peers read the status."""
    say(*traceback.format_exc().splitlines(), to_errors=True)
    _leave(status, 1, f"{type(error).__name__}: {error}")


def _leave(status: ExitStatus, code: int, reason: str) -> NoReturn:
    # Nothing may keep this process from leaving, such as a full disk behind standard output.
    with contextlib.suppress(OSError, ValueError):
        first = status.write(code, reason)
        if first and not (status.claim.refusal and status.rank):
            say_error(reason)
        sys.stdout.flush()
        sys.stderr.flush()
    status.claim.release()
    os._exit(code)
