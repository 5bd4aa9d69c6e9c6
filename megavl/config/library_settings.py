"""Settings of torch and CUDA's libraries that a run on CUDA makes through its environment, unless they are set."""

from __future__ import annotations

from collections.abc import Mapping

_MOST_THREADS = 32
"""torch's own limit of threads that compile."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Today's and the earlier name of the allocator's settings."""


def library_settings(*, ranks: int, cores: int | None) -> dict[str, str]:
    """Names and values of environment variables.

    Args:
        ranks: processes of this machine.
        cores: of this machine; None where they are not known yet, for a plan.
    """
    threads = f"cores / {ranks}" if cores is None else str(max(1, min(_MOST_THREADS, cores // ranks)))
    return {
        # Text and image steps ask for pieces of other sizes; segments that grow leave fewer gaps.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # Every rank would otherwise start a thread for each core.
        "TORCHINDUCTOR_COMPILE_THREADS": threads,
        # Collectives that a debugger of a hang can look at.
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    }


def missing_settings(environment: Mapping[str, str], *, ranks: int, cores: int) -> dict[str, str]:
    """`library_settings` without those that an environment has already."""
    found = library_settings(ranks=ranks, cores=cores)
    taken = {*environment, *(_ALLOCATOR if any(name in environment for name in _ALLOCATOR) else ())}
    return {name: value for name, value in found.items() if name not in taken}
