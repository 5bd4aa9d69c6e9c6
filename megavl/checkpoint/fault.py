"""Fault injection for tests: `FAULT=<site>:<rank>:<step>:<kind>` makes one site of a save fail.

Sites of a save, in order: before_mkdir, mid_shard, after_shard, after_manifest, after_rename, mid_retention.
Kinds: sigkill, sigterm, sigstop, raise (RuntimeError), enospc and eio (OSError, as the file system would report it).
"""

from __future__ import annotations

import errno
import os
import signal

_SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigstop": signal.SIGSTOP}
_ERRNOS = {"enospc": errno.ENOSPC, "eio": errno.EIO}


def inject_fault(site: str, *, rank: int, step: int) -> None:
    """Fail here if the environment asks for a fault at this site, rank and step."""
    plan = os.environ.get("FAULT")
    if not plan:
        return
    wanted_site, wanted_rank, wanted_step, kind = plan.split(":")
    if (wanted_site, int(wanted_rank), int(wanted_step)) != (site, rank, step):
        return
    if kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
    elif kind in _ERRNOS:
        raise OSError(_ERRNOS[kind], os.strerror(_ERRNOS[kind]), f"fault at {site}")
    elif kind == "raise":
        raise RuntimeError(f"fault at {site}")
    else:
        raise ValueError(f"FAULT={plan}: unknown kind {kind!r}")
