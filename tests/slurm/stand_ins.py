"""Stand-ins for SLURM's programs: they note how they were called, and end as a test asks."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = "launch/recipes/tiny/stage1.yaml"
TOOLS = ("bash", "basename", "cat", "dirname", "env", "grep", "mkdir", "mktemp", "realpath")
TOOLS += ("rm", "sed", "sleep", "stat", "tr", "touch")

# Every stand-in notes how it was called. srun then ends as the test asks, after it has seen a signal where one is due.
NOTE = '#!/bin/bash\nprintf "%q " "${0##*/}" "$@" >>"$CALLS"; echo >>"$CALLS"\n'
STAND_INS = {
    "sbatch": "echo Submitted batch job 41",
    "sinfo": 'echo "$GRES"',
    "squeue": 'echo "${JOB_STATE-RUNNING None}" >&${SQUEUE_SAYS:-1}; exit $((${SQUEUE_SAYS:-1} - 1))',
    "scontrol": 'case $2 in hostnames) printf "alpha\\nbeta\\n";; esac',
    "srun": r"""
trap 'echo "srun got USR1" >>"$CALLS"; got=1' USR1
trap 'echo "srun got TERM" >>"$CALLS"; got=1' TERM
if [ -n "$AWAIT_SIGNAL" ]; then
  touch "$CALLS.ready"
  for _ in {1..12000}; do [ -z "$got" ] || break; sleep 0.05; done
fi
if [ -n "$STATUS_FILE" ]; then echo "$STATUS_CONTENT" >"$STATUS_FILE"; fi
exit "${SRUN_CODE:-0}"
""",
}


@dataclass
class Stage:
    """A machine with chosen programs on its PATH."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def calls(self) -> list[list[str]]:
        log = self.folder / "calls"
        return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []

    def called(self, *start: str) -> list[list[str]]:
        return [call for call in self.calls if call[: len(start)] == list(start)]

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {"HOME": str(self.folder), "CALLS": str(self.folder / "calls"), "PATH": str(self.folder / "bin")}
        defaults = {"PYTHON": sys.executable, "RUN_DIR": str(self.run_dir), "RECIPE": TINY}
        return {**kept, **defaults, **settings}

    def start(self, script: str = "pretrain_7b", cwd: Path = ROOT, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / f"{script}.sh")],
            cwd=cwd,
            env=self.environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where the tests ignore SIGINT, as in the background, a shell could not trap it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str = "pretrain_7b", cwd: Path = ROOT, **settings: str) -> tuple[int, str, str]:
        process = self.start(script, cwd, **settings)
        out, err = process.communicate(timeout=1800)
        return process.returncode, out, err


def make_stage(folder: Path, *, slurm: bool) -> Stage:
    programs = folder / "bin"
    programs.mkdir()
    for name in TOOLS:
        for system in ("/usr/bin", "/bin"):
            if (Path(system) / name).exists() and not (programs / name).exists():
                (programs / name).symlink_to(Path(system) / name)
    for name, text in STAND_INS.items() if slurm else ():
        (programs / name).write_text(NOTE + text + "\n")
        (programs / name).chmod(0o755)
    return Stage(folder)


JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x[1-2]", "GPUS_PER_NODE": "2"}
