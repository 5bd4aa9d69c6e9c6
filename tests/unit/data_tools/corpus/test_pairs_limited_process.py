"""Separate processes end at their limits, and nothing of them survives."""

import time

import pytest

from data_tools.corpus.pairs.documents.limited_process import PYTHON, Limits, run_limited

LIMITS = Limits(seconds=1800, cpu_seconds=20, memory=1 << 30, file_size=1 << 20)


def run(code, folder, *, request=b"", **changed):
    limits = Limits(**{**vars(LIMITS), **changed})
    return run_limited([PYTHON, "-I", "-S", "-c", code], request=request, limits=limits, folder=folder)


def test_a_process_answers_its_request(tmp_path):
    outcome = run("import sys; sys.stdout.write(sys.stdin.read().upper())", tmp_path, request=b"word " * 1000)
    assert outcome.good and outcome.output == b"WORD " * 1000
    outcome = run("import sys; print('why', file=sys.stderr); sys.exit(3)", tmp_path, request=b"x" * 1_000_000)
    assert (outcome.timed_out, outcome.code, outcome.message, outcome.good) == (False, 3, "why\n", False)


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("import time; time.sleep(60)", {"seconds": 0.5}),
        ("while True: pass", {"cpu_seconds": 1}),
        ("while True: print('x' * 1000)", {}),
        ("x = bytearray(2 << 30)", {}),
        ("open('file', 'wb').write(bytes(2 << 20))", {}),
    ],
    ids=["time", "cpu", "output", "memory", "file"],
)
def test_every_limit_ends_the_process(tmp_path, code, changed):
    outcome = run(code, tmp_path, **changed)
    assert outcome.timed_out == ("seconds" in changed) and not outcome.good
    assert len(outcome.output) <= LIMITS.file_size
    assert all(path.stat().st_size <= LIMITS.file_size for path in tmp_path.iterdir())


def test_child_processes_are_killed(tmp_path):
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.close(0); os.close(1); os.close(2)\n"
        "    time.sleep(1); open('alive', 'w').close()\n"
    )
    assert run(code, tmp_path).good
    time.sleep(1.5)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_not_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    outcome = run("import os; print('SECRET_TOKEN' in os.environ)", tmp_path)
    assert outcome.output == b"False\n"
