"""Bubblewrap for Chromium: a namespace without network, other processes or the user's files."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

_NOBODY = "65534"


@cache
def isolation_problem() -> str | None:
    """Why bubblewrap cannot be used here, or None when it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian: apt install bubblewrap)"
    probe = subprocess.run([*_bubblewrap(), "--", "/usr/bin/env", "true"], capture_output=True, text=True, check=False)
    return f"bubblewrap does not work here ({probe.stderr.strip()[:300]})" if probe.returncode else None


def write_isolated_launcher(program: str, *, folder: Path) -> str:
    """Write a script that starts Chromium inside bubblewrap, where Chromium's own sandbox still works.

    Returns:
        The path of the script.
    """
    options = _bubblewrap()
    if not program.startswith(("/usr/", "/opt/")):
        program = str(Path(program).resolve())
        parent = str(Path(program).parent)
        options += ["--ro-bind", parent, parent]
    script = folder / "chromium"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([*options, "--", program])} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return str(script)


def _bubblewrap() -> list[str]:
    """Bubblewrap and its options; inside, the system's programs and libraries are visible, read-only."""
    options = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    options += ["--die-with-parent", "--uid", _NOBODY, "--gid", _NOBODY]
    options += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    optional = ("/etc/ld.so.cache", "/etc/fonts", "/etc/alternatives", "/opt", "/etc/chromium", "/etc/chromium.d")
    for name in optional:
        options += ["--ro-bind-try", name, name]
    return [*options, "--tmpfs", "/tmp", "--setenv", "HOME", "/tmp"]
