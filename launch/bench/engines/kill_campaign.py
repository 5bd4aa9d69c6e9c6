"""Kills training runs with SIGKILL at random moments, and compares how they end with an undisturbed run.

Each run has two ranks: tensor-parallel, pipeline or data-parallel. A kill hits one rank, both, or the launcher and
what else a table says. Then the same command starts again, until the run ends. Its losses and every byte of its last
checkpoint must be those of the undisturbed run. One JSON line is appended for each kill; a campaign that is started
again goes on after the last line.

Ranks are forked from this process, which has torch imported, since importing it takes longer than such a run.

    python -m launch.bench.engines.kill_campaign --data DIR --work DIR --out kills.jsonl --kills 100
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.bench.programs import CPU

RECIPE = "launch/recipes/tiny/stage2.yaml"
STEPS = 6
IMPORTED = ("torch.distributed.run", "megavl.train.loop", "megavl.main.train")
LAYOUTS = {
    "tp2": ("parallel.tensor=2", "parallel.pipeline=1", "parallel.sequence_parallel=true"),
    "pp2": ("parallel.tensor=1", "parallel.pipeline=2"),
    "dp2": ("parallel.tensor=1", "parallel.pipeline=1"),
}
VICTIMS = {"rank 0": 3, "rank 1": 3, "both ranks": 3, "launcher": 1}
"""Ranks of a run without launcher, or torchrun alone, whose ranks then have to leave by themselves; how often each is
hit. Under torchrun the ranks are fresh interpreters, which take ten times as long to start."""
COLUMNS = ("step", "modality", "loss", "grad_norm", "lr", "loss_tokens", "images", "skipped", "consumed_samples")
"""What a repeated step repeats; the other columns are times and memory."""
REFUSED = 2
PATIENCE_S = 1800.0


@dataclass
class Run:
    """A run of one layout in `folder`, started as often as needed."""

    folder: Path
    settings: Sequence[str]
    log: Path
    ranks: dict[int, int] = field(default_factory=dict)
    """Rank by process, of those that live."""
    codes: dict[int, int] = field(default_factory=dict)
    """How each rank ended; minus a signal's number where one killed it. Key -1: the launcher."""
    orphans: list[int] = field(default_factory=list)
    """Ranks whose launcher was killed."""

    def start(self) -> None:
        """Fork both ranks."""
        port, self.codes = free_port(), {}
        for rank in range(2):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            variables = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in world.items()}}
            self.ranks[fork("megavl", ["train", *self.settings], variables=variables, log=self.log)] = rank

    def start_launcher(self) -> int:
        """Start torchrun, which starts both ranks; returns its process."""
        self.codes = {}
        words = ["--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "megavl", "train", *self.settings]
        launcher = fork("torch.distributed.run", words, variables={}, log=self.log)
        self.ranks[launcher] = -1
        return launcher

    def wait(self, seconds: float) -> bool:
        """Collect ended processes for at most some seconds; returns whether all have ended."""
        end = time.monotonic() + seconds
        while self.ranks:
            for pid in list(self.ranks):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[self.ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            if self.ranks and time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def kill(self, victim: str) -> None:
        """End one rank, both, or the launcher."""
        hit = {"rank 0": (0,), "rank 1": (1,), "both ranks": (0, 1), "launcher": (-1,)}[victim]
        for pid, rank in list(self.ranks.items()):
            if rank in hit:
                for children in Path(f"/proc/{pid}/task").glob("*/children"):
                    # A thread of the launcher may end meanwhile.
                    with contextlib.suppress(OSError):
                        self.orphans += map(int, children.read_text().split())
                os.kill(pid, signal.SIGKILL)

    def finish(self) -> int:
        """Start until the run ends; a refusal means that ranks of an earlier start still live. Returns the starts."""
        for count in range(1, 1000):
            self.start()
            if not self.wait(PATIENCE_S):
                raise SystemExit(f"error: {self.folder}: a rank hangs; see {self.log}")
            if self.log.exists() and b"training.compile:" in self.log.read_bytes():
                raise SystemExit(f"error: {self.folder}: a rank did not compile; see {self.log}")
            if set(self.codes.values()) == {0}:
                return count
            if set(self.codes.values()) != {REFUSED}:
                raise SystemExit(f"error: {self.folder}: ended with {self.codes}; see {self.log}")
            time.sleep(1)
        raise SystemExit(f"error: {self.folder}: every start was refused; see {self.log}")

    def wait_for_orphans(self) -> None:
        """They have to leave by themselves."""
        end = time.monotonic() + PATIENCE_S
        while any(Path(f"/proc/{pid}").exists() for pid in self.orphans):
            if time.monotonic() > end:
                raise SystemExit(f"error: {self.folder}: ranks {self.orphans} outlive their launcher; see {self.log}")
            time.sleep(0.1)

    def state(self) -> dict[str, Any]:
        """Steps that are logged, committed checkpoints, and whether a save is under way."""
        names = [path.name for path in (self.folder / "checkpoints").glob("iter_*")]
        return {
            "logged": len(rows(self.folder)),
            "committed": max((int(name[5:]) for name in names if name[5:].isdigit()), default=0),
            "saving": any(".tmp-" in name for name in names),
        }

    def result(self) -> dict[str, Any]:
        """Losses and the bytes of the last checkpoint."""
        last = self.folder / "checkpoints" / f"iter_{STEPS:07d}"
        files = {
            path.relative_to(last).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(last.rglob("*"))
            if path.is_file()
        }
        return {"rows": [[row[name] for name in COLUMNS] for row in rows(self.folder)], "files": files}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a line that a kill left incomplete is skipped."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def fork(module: str, words: Sequence[str], *, variables: dict[str, str], log: Path) -> int:
    """Run `python -m module words` in a fork of this process; returns the process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ.update(variables)
        sys.argv = [module, *words]
        code = importlib.import_module("megavl.main.cli" if module == "megavl" else module).main(list(words)) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def free_port() -> int:
    """A port that nothing listens on, below those that the system gives to outgoing connections."""
    for port in random.SystemRandom().sample(range(12000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("error: none of 100 ports is free")


def settings(layout: str, *, data: Path, folder: Path, extra: Sequence[str]) -> list[str]:
    """Recipe and overrides of a run."""
    return [
        *(RECIPE, *LAYOUTS[layout], "parallel.layout=auto", "parallel.timeout_s=120"),
        *(f"data.sources=[{{path: {data}/shards}}]", f"data.tokenizer={data}/corpus/tokenizer", "data.seq_length=256"),
        *(f"run.dir={folder}", "run.tensorboard=false", "checkpoint.init=null", "checkpoint.allow_random_init=true"),
        *(f"training.steps={STEPS}", "training.global_batch_size=2", "training.micro_batch_size=1"),
        *("optimizer.warmup_steps=2", "checkpoint.interval=2"),
        *("data.multimodal_fraction=0.5", "data.modality_warmup_steps=0"),
        *extra,
    ]


def make_run(layout: str, *, data: Path, work: Path, extra: Sequence[str]) -> Run:
    """A fresh run; all runs have the same path, which their checkpoints record."""
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    log = work / "last.log"
    log.unlink(missing_ok=True)
    return Run(folder=folder, settings=settings(layout, data=data, folder=folder, extra=extra), log=log)


def compiles(extra: Sequence[str]) -> bool:
    """Whether the runs need torch's compiler."""
    return any(setting.startswith("training.compile=") for setting in extra)


def reference(layout: str, *, data: Path, work: Path, extra: Sequence[str]) -> dict[str, Any]:
    """What an undisturbed run gives, and its seconds; made once."""
    path = work / f"reference_{layout}.json"
    if not path.exists():
        if compiles(extra):
            # The compiler keeps what it made, so that only the first run waits for it.
            make_run(layout, data=data, work=work, extra=extra).finish()
        run, began = make_run(layout, data=data, work=work, extra=extra), time.monotonic()
        run.finish()
        path.write_text(json.dumps({"result": run.result(), "seconds": time.monotonic() - began}))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def one_kill(
    number: int, *, seed: int, victims: Sequence[str], data: Path, work: Path, extra: Sequence[str]
) -> dict[str, Any]:
    """Kill a run at a random moment, let it end, and compare."""
    draw = random.Random(f"{seed} {number}")
    layout, victim = list(LAYOUTS)[number % len(LAYOUTS)], draw.choices(victims, [VICTIMS[name] for name in victims])[0]
    where: dict[str, Any] = {"data": data, "work": work, "extra": extra}
    wanted, share, missed = reference(layout, **where), draw.random(), 0
    while True:
        run, began = make_run(layout, **where), time.monotonic()
        if victim == "launcher":
            run.start_launcher()
            while not run.folder.exists() and not run.wait(0.02):
                pass
        else:
            run.start()
        if not run.wait(share * wanted["seconds"]):
            break
        # The run was over before the kill.
        share, missed = draw.random() * share, missed + 1
    before = run.state()
    run.kill(victim)
    if not run.wait(PATIENCE_S):
        raise SystemExit(f"error: kill {number}: a rank outlives its peer by {PATIENCE_S:.0f} s; see {run.log}")
    codes, starts = dict(sorted(run.codes.items())), run.finish()
    run.wait_for_orphans()
    found = run.result()
    return {
        "kill": number,
        "layout": layout,
        "victim": victim,
        "after_s": round(time.monotonic() - began, 1),
        **before,
        "codes": codes,
        "refused": starts - 1,
        "missed": missed,
        "equal_losses": found["rows"] == wanted["result"]["rows"],
        "equal_bytes": bool(found["files"]) and found["files"] == wanted["result"]["files"],
    }


def main() -> int:
    """Go on with the campaign; 1 if some run ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with `shards` and `corpus/tokenizer`")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="file that the results are appended to")
    parser.add_argument("--first", type=int, default=0, help="number of the first kill: campaigns may run side by side")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ.update(CPU)
    if compiles(arguments.set):
        for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            os.environ.pop(name, None)
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose a thread"
    gc.collect()
    gc.freeze()
    done = len(arguments.out.read_text().splitlines()) if arguments.out.exists() else 0
    for number in range(arguments.first + done, arguments.first + arguments.kills):
        folders = {"data": arguments.data.resolve(), "work": arguments.work.resolve()}
        row = one_kill(number, seed=arguments.seed, victims=arguments.victims, extra=arguments.set, **folders)
        with arguments.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    found = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    return 0 if all(row["equal_losses"] and row["equal_bytes"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
