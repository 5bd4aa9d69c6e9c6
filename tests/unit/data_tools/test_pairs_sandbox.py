"""The sandbox: limits hold, nothing survives, and isolation takes away network, files and processes."""

import errno
import os
import struct
import time

import pytest

from data_tools.corpus.pairs.sandbox import INSIDE, PYTHON, Limits, isolation_problem, run_limited
from data_tools.corpus.pairs.system_calls import filter_problem, filter_program

LIMITS = Limits(seconds=120, cpu_seconds=20, memory=1 << 30, file_size=1 << 20, output=10_000)
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
    outcome = run(code, folder=tmp_path, **changed)
    assert outcome.ended == ended and not outcome.good
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
def test_isolated_code_cannot_hide(monkeypatch):
    """Neither the environment nor the accounts of the machine, and what daemons do to outlive their parent."""
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    code = (
        "import os, glob\n"
        "print('SECRET_TOKEN' in os.environ, glob.glob('/proc/[0-9]*/environ') != [])\n"
        "print(any(b'SECRET_TOKEN' in open(path, 'rb').read() for path in glob.glob('/proc/self/environ')))\n"
        "for path in ('/etc/passwd', '/etc/shadow', '/etc/hostname', '/var', '/home', '/run'):\n"
        "    print(os.path.exists(path))\n"
    )
    outcome = run(code, isolated=True)
    assert outcome.good, outcome.message
    assert outcome.output.decode().split() == ["False", "True", *["False"] * 7]


@isolated_only
@pytest.mark.parametrize(
    "code",
    ["os.fork()", "os.posix_spawn('/usr/bin/env', ['env'], {})", "subprocess.run(['/usr/bin/env'])"],
    ids=["fork", "spawn", "subprocess"],
)
def test_isolated_code_starts_no_process(code):
    """So a fork bomb ends with its first fork, for root too."""
    code = f"import os, subprocess\ntry: {code}\nexcept PermissionError: print('refused')\nelse: print('started')"
    outcome = run(code, isolated=True)
    assert outcome.good and outcome.output == b"refused\n", outcome


@isolated_only
def test_isolated_code_may_use_threads():
    """Numerical libraries do."""
    code = "import threading\nt = threading.Thread(target=print, args=('done',)); t.start(); t.join()"
    outcome = run(code, isolated=True)
    assert outcome.good and outcome.output == b"done\n", outcome


MEMORY = """
import ctypes, os, sys
library = ctypes.CDLL(None, use_errno=True)
def files(place):
    for number in range(8):
        with open(os.path.join(place, f"file{number}"), "wb") as file:
            file.write(bytes(900_000))
def call(name, *arguments):
    if getattr(library, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
ways = {
    "heap": lambda: bytearray(1 << 30),
    "unnamed": lambda: os.memfd_create("x"),
    "shared": lambda: call("shmget", 0, 1 << 20, 0o1600),
    "namespace": lambda: call("unshare", 0x10020000),
    "mount": lambda: call("mount", b"tmpfs", b"/sandbox", b"tmpfs", 0, b""),
    **{place: lambda place=place: files(place) for place in ("/", "/dev", "/dev/shm", "/etc", "/tmp", "/sandbox")},
}
try:
    ways[sys.argv[1]]()
except (OSError, MemoryError) as error:
    print(type(error).__name__, getattr(error, "errno", None))
else:
    print("got it")
"""


@isolated_only
@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("heap", "MemoryError None"),
        ("unnamed", "PermissionError 1"),
        ("shared", "PermissionError 1"),
        ("namespace", "PermissionError 1"),
        ("mount", "PermissionError 1"),
        *((place, "OSError 30") for place in ("/", "/dev", "/dev/shm", "/etc")),
        *((place, "OSError 28") for place in ("/tmp", INSIDE)),
    ],
)
def test_isolated_code_gets_no_memory_beyond_the_limit(way, expected):
    """Neither by its own addresses nor by what the kernel does not count there: files in memory, shared segments."""
    limits = Limits(**{**vars(LIMITS), "memory": 512 << 20})
    outcome = run_limited([PYTHON, "-I", "-S", "-c", MEMORY, way], request=b"", limits=limits, isolated=True)
    assert outcome.good and outcome.output.decode().strip() == expected, outcome


@isolated_only
@pytest.mark.parametrize(
    ("code", "changed", "ended"),
    [("while True: pass", {"cpu_seconds": 1}, "exit"), ("import time; time.sleep(60)", {"seconds": 1.5}, "time")],
    ids=["cpu", "time"],
)
def test_isolated_code_ends(code, changed, ended):
    outcome = run(code, isolated=True, **changed)
    assert outcome.ended == ended and not outcome.good


def test_filter_of_system_calls():
    """The program is judged as the kernel does it: by the number and the first argument of each call."""
    for machine, known in {"x86_64": (0xC000003E, 56, 57), "aarch64": (0xC00000B7, 220, 40)}.items():
        number, clone, refused = known
        program = filter_program(machine)
        assert verdict(program, number, 63) == verdict(program, number, clone, 0x3D0F00) == 0x7FFF0000
        assert verdict(program, number, refused) == verdict(program, number, clone, 17) == 0x00050001
        assert verdict(program, number, 435) == 0x00050000 | errno.ENOSYS
        assert verdict(program, number, 0x40000000 + refused) == 0x00050001
        assert verdict(program, 0x40000003, 63) == 0x80000000, "another machine's calls have other numbers"
    assert "riscv64" in (filter_problem("riscv64") or "")


def verdict(program, machine, number, argument=0):
    """What a filter says of one call (classic BPF, the few instructions that occur)."""
    fields = {0: number, 4: machine, 16: argument}
    steps = list(struct.iter_unpack("<HBBI", program))
    held, place = 0, 0
    while True:
        code, yes, no, value = steps[place]
        if code == 0x06:
            return value
        if code == 0x20:
            held, place = fields[value], place + 1
        else:
            holds = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code]
            place += 1 + (yes if holds else no)
