"""Filter of system calls for isolated processes, as a program for seccomp (Linux, `bwrap --seccomp`).

Namespaces hide files and the network, but leave ways around the limit of memory, which counts the address space of one
process: further processes, and memory that belongs to none (shared segments, unnamed files, file systems mounted inside
a namespace of one's own). This takes these away, also from root, whom the limit on processes does not bind.

The program is classic BPF over `struct seccomp_data` (Linux, Documentation/userspace-api/seccomp_filter.rst); numbers
of calls from arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping

_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
"""Bytes before the field in `struct seccomp_data`; of the argument the low half (little-endian)."""
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000
"""Numbers of the x32 calling convention start here."""

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_REFUSED: Mapping[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
}
"""Number of each call on x86_64 and on aarch64."""


def filter_problem(machine: str | None = None) -> str | None:
    """Why there is no filter for a machine (this one); None when there is."""
    machine = machine or platform.machine()
    return None if machine in _MACHINES else f"no filter of system calls is known for {machine}"


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a machine (this one), in the form that the kernel takes."""
    machine = machine or platform.machine()
    assert filter_problem(machine) is None, machine
    place = list(_MACHINES).index(machine)
    program = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, _MACHINES[machine]), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), _fail(errno.EPERM)]
    # The C library then takes clone, whose flags can be read here.
    program += [(_EQUAL, 0, 1, _CLONE3), _fail(errno.ENOSYS)]
    for numbers in _REFUSED.values():
        number = numbers[place]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), _fail(errno.EPERM)]
    program += [(_EQUAL, 1, 0, _CLONE[machine]), (_RETURN, 0, 0, _ALLOW)]
    program += [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_BITS, 1, 0, _CLONE_THREAD), _fail(errno.EPERM)]
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *step) for step in program)


def _fail(number: int) -> tuple[int, int, int, int]:
    return _RETURN, 0, 0, _FAIL | number
