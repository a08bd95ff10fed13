"""How a process of training keeps its memory."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """From now on freed memory stays with the process.

    By default glibc hands every large block back to the system, and taking it again page by page costs more than many
    kernels that use it, by a factor that depends on the machine's virtualisation. Nothing happens elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    mallopt(-8, 1)  # M_ARENA_MAX: the thread of the gradients would have its own heap, and give it back when empty
    mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
