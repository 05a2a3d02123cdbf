"""Forbids system calls to a process and its children: python -m tests.seccomp CALL,... COMMAND...

What a container does that lets no io_uring through. A filter on system calls stays for good.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SYSCALLS = {
    "x86_64": {
        "io_uring_setup": 425,
        "io_uring_enter": 426,
        "io_setup": 206,
        "io_getevents": 208,
        "io_submit": 209,
        "seccomp": 317,
        "cachestat": 451,
    },
    "aarch64": {
        "io_uring_setup": 425,
        "io_uring_enter": 426,
        "io_setup": 0,
        "io_getevents": 4,
        "io_submit": 2,
        "seccomp": 277,
        "cachestat": 451,
    },
}[platform.machine()]
SET_NO_NEW_PRIVS = 38
SET_FILTER, ALL_THREADS = 1, 1
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid(names: Iterable[str], name_of_errno: str = "EPERM") -> None:
    """From now on these calls fail with this errno, in every thread and every child."""
    libc = ctypes.CDLL(None, use_errno=True)
    # struct sock_filter: code, jump if true, jump if false, operand. The calls' numbers are at 0.
    instruction = struct.Struct("=HBBI").pack
    program = instruction(0x20, 0, 0, 0)
    for name in names:
        program += instruction(0x15, 0, 1, SYSCALLS[name])
        program += instruction(0x06, 0, 0, FAIL_WITH | getattr(errno, name_of_errno))
    program += instruction(0x06, 0, 0, ALLOW)
    if libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or (
        libc.syscall(
            SYSCALLS["seccomp"],
            SET_FILTER,
            ALL_THREADS,
            ctypes.byref(_Program(len(program) // 8, program)),
        )
        != 0
    ):
        raise OSError(ctypes.get_errno(), "no filter on system calls can be set")


if __name__ == "__main__":
    forbid(sys.argv[1].split(","))
    os.execvp(sys.argv[2], sys.argv[2:])
