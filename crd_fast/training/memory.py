"""Host memory: keep what was freed, and the peak of the process."""

from __future__ import annotations

import ctypes
import platform
import resource

_MALLOPT_TRIM_THRESHOLD, _MALLOPT_TOP_PAD, _MALLOPT_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks instead of returning them to the kernel; False where there is no glibc.

    A CPU training step allocates and frees the same few hundred megabytes again and again; by default glibc unmaps
    every large block, and the kernel spends a good part of the step clearing the pages it hands out next.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    done = [
        libc.mallopt(_MALLOPT_MMAP_MAX, 0),
        libc.mallopt(_MALLOPT_TRIM_THRESHOLD, 2**31 - 1),
        libc.mallopt(_MALLOPT_TOP_PAD, 64 * 2**20),
    ]
    return all(done)


def peak_gigabytes() -> float:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if platform.system() == "Darwin" else peak / 2**20
