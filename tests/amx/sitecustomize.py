"""Asks the kernel for AMX tiles in every Python process that starts with this directory on its path.

vLLM's CPU attention uses AMX for bfloat16 without asking; a process in which no other library asked first is
killed by SIGILL at its first step, with or without tlcore. The permission does not survive ``exec``, so each
engine and worker must ask by itself, and Python imports a module of this name at every start.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable

ARCH_PRCTL = 158
ARCH_GET_XCOMP_PERM = 0x1022
ARCH_REQ_XCOMP_PERM = 0x1023
XTILEDATA = 18


def permit_amx(system_call: Callable[[int, int, int], int] | None = None) -> bool:
    """Ask for the permission; False where the machine has no AMX or the kernel knows no such request."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    call = system_call or ctypes.CDLL(None).syscall
    return int(call(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)) == 0


def permitted() -> bool:
    """Whether the kernel says that this process has the permission."""
    mask = ctypes.c_uint64()
    known = ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(mask)) == 0
    return known and bool(mask.value >> XTILEDATA & 1)


granted = permit_amx()
