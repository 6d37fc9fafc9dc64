"""What glibc's malloc does with memory that is given back.

XLA's CPU client takes the memory of a whole program anew at every call, gigabytes for a training step, and gives it
back at its end. By itself glibc returns that to the system, and the next call pays for every page again: a seventh of a
step's processor time (docs/performance.md).
"""

import ctypes
import os
from pathlib import Path

# Of malloc.h: parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# What says that programs run elsewhere: TPUs and GPUs.
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")


def keep_freed_memory() -> bool:
    """Has freed memory stay with this process, for the next call; to be called before threads are started.

    All of it comes from one heap that is never trimmed: the process stays as large as it once was.

    Returns:
      Whether it did: not with a C library other than glibc, not if the environment already says how malloc is to
      behave, and not where an accelerator computes.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if told or mallopt is None or not _on_cpu():
        return False
    # Threads' own heaps are of 64 MiB at most, and what is larger would be mapped, and unmapped, by itself.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def _on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not any(next(Path("/dev").glob(pattern), None) for pattern in _ACCELERATORS)
