"""A forked Python behaves as one that was started: arguments, streams, exit status, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests import fork_server
from tests.tiny_run import PATIENCE_S, ROOT, environment

SHOWS = (
    "import os, sys; print(sys.argv, sys.path[0], os.getcwd(), os.environ['MARK'], __name__, 'torch' in sys.modules)"
)
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(3600)"


def run(*words: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [fork_server.python(environment()), *words]
    return subprocess.run(
        command, cwd=ROOT, env={**environment(), **variables}, input=text, capture_output=True, text=True, check=False
    )


def test_arguments_folder_and_environment_arrive() -> None:
    done = run("-u", "-W", "ignore", "-c", SHOWS, "a", "-b c", MARK="here")
    assert done.stdout == f"['-c', 'a', '-b c'] {ROOT} {ROOT} here __main__ True\n" and not done.stderr
    assert "--nproc-per-node" in run("-m", "torch.distributed.run", "--help").stdout


def test_another_state_starts_a_usual_python() -> None:
    assert run("-c", SHOWS, MARK="", OMP_NUM_THREADS="2").stdout.endswith("__main__ False\n")
    assert run("-X", "utf8", "-c", SHOWS, MARK="").stdout.endswith("__main__ False\n")


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("print(input()); raise SystemExit(3)", 3, ""),
        ("print(input(), flush=True); import os; os._exit(75)", 75, ""),
        ("print(input()); raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("print(input(), flush=True); import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("print(input(), flush=True); import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
    ],
)
def test_end_is_passed_on(code: str, status: int, error: str) -> None:
    done = run("-c", code, text="a line\n")
    assert (done.returncode, done.stdout) == (status, "a line\n") and done.stderr.endswith(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_the_forked_process(number: signal.Signals) -> None:
    command = [fork_server.python(environment()), "-c", SLEEPS]
    client = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    assert pid != client.pid
    client.send_signal(number)
    assert client.wait() == -number
    deadline = time.monotonic() + PATIENCE_S
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
