"""The sandbox: limits hold, nothing survives, and isolation takes away network, files and processes."""

import os
import time

import pytest

from data_tools.corpus.sandbox import INSIDE, PYTHON, Limits, isolation_problem, run_limited

LIMITS = Limits(seconds=20, cpu_seconds=20, memory=1 << 30, file_size=1 << 20, output=10_000)
isolated_only = pytest.mark.skipif(isolation_problem() is not None, reason=f"no isolation here: {isolation_problem()}")


def run(code, *, isolated=False, request=b"", folder=None, **changed):
    limits = Limits(**{**vars(LIMITS), **changed})
    command = [PYTHON, "-I", "-S", "-c", code]
    return run_limited(command, request=request, limits=limits, isolated=isolated, folder=folder)


def test_request_and_answer():
    outcome = run("import sys; sys.stdout.write(sys.stdin.read().upper())", request=b"word " * 1000)
    assert outcome.good and outcome.output == b"WORD " * 1000
    outcome = run("import sys; print('why', file=sys.stderr); sys.exit(3)", request=b"x" * 1_000_000)
    assert (outcome.ended, outcome.code, outcome.message, outcome.good) == ("exit", 3, "why\n", False)


@pytest.mark.parametrize(
    ("code", "changed", "ended"),
    [
        ("import time; time.sleep(60)", {"seconds": 0.5}, "time"),
        ("while True: pass", {"cpu_seconds": 1}, "exit"),
        ("while True: print('x' * 1000)", {}, "output"),
        ("x = bytearray(2 << 30)", {}, "exit"),
        ("open('file', 'wb').write(bytes(2 << 20))", {}, "exit"),
    ],
    ids=["time", "cpu", "output", "memory", "file"],
)
def test_limits(tmp_path, code, changed, ended):
    begun = time.monotonic()
    outcome = run(code, folder=tmp_path, **changed)
    assert outcome.ended == ended and not outcome.good
    assert time.monotonic() - begun < 15
    assert all(path.stat().st_size <= LIMITS.file_size for path in tmp_path.iterdir())


def test_nothing_survives(tmp_path):
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.close(0); os.close(1); os.close(2)\n"
        "    time.sleep(1); open('alive', 'w').close()\n"
    )
    assert run(code, folder=tmp_path).good
    time.sleep(1.5)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    outcome = run("import os; print('SECRET_TOKEN' in os.environ)")
    assert outcome.output == b"False\n"


@isolated_only
def test_isolation(tmp_path):
    (tmp_path / "secret").write_text("abc")
    code = (
        "import os, socket\n"
        f"print(os.path.exists({str(tmp_path)!r}), os.getcwd(), os.listdir('.'), os.getuid())\n"
        "try: open('/usr/written', 'w')\n"
        "except OSError as error: print(type(error).__name__)\n"
        "try: socket.create_connection(('127.0.0.1', 9), 2)\n"
        "except OSError as error: print(error.errno)\n"
        "print(sorted(int(name) for name in os.listdir('/proc') if name.isdigit())[-1] < 20)\n"
        f"print(os.path.exists('/proc/{os.getpid()}/environ'))\n"
        "try:\n"
        "    for n in range(4): open(f'file{n}', 'wb').write(bytes(900_000))\n"
        "except OSError as error: print(error.errno)\n"
    )
    outcome = run(code, isolated=True)
    assert outcome.good, outcome.message
    here, written, refused, processes, other, full = outcome.output.decode().splitlines()
    assert here == f"False {INSIDE} [] 65534" and written in ("OSError", "PermissionError")
    # Not even this machine's own ports: connection refused (111) in a network of its own.
    assert int(refused) in (101, 111)
    assert (processes, other) == ("True", "False")
    assert int(full) == 28, "the memory behind the working folder is bounded (no space left)"


@isolated_only
def test_nothing_survives_isolation_either():
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
    begun = time.monotonic()
    assert run(code, isolated=True, seconds=10).ended == "exit" and time.monotonic() - begun < 8
