"""Memory of large bodies goes back to the system."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_THRESHOLD = 2**20


def return_large_blocks() -> None:
    """Have the allocator map blocks of a megabyte and more by themselves.

    By itself glibc raises that bound to the largest block it has seen, up to 32 MiB, and keeps twice as much for the
    process for ever: after a few uploads a gateway would stay 100 MiB larger. Other allocators have no such function,
    and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
