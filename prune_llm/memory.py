"""Freed memory goes back to the system at once, so that a block is all that stays."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable


def return_freed_memory() -> None:
    """Make glibc hand tensors above 8 MB back to the system as soon as they are freed.

    It raises its own limit to 32 MB otherwise and keeps what was freed in fragments, a block's
    worth and more. Holds for the process; other allocators are left as they are.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 8 << 20)
        # what a block's run frees it needs again at once: handing it back costs a fault a page
        mallopt(M_TRIM_THRESHOLD, 32 << 20)


M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h


def trim_heap() -> None:
    """Hand back what freed blocks left in the heap."""
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def _libc(function: str) -> Callable[..., int] | None:
    """A function of glibc; None on other systems."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
