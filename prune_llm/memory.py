"""The memory there is; freed memory goes back to the system at once, so that a block is all that
stays."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path


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


def available_memory() -> int:
    """Bytes that can be had without swapping, of the machine and of this process's group."""
    meminfo = Path("/proc/meminfo")
    found = [_meminfo(meminfo)] if meminfo.is_file() else [1 << 62]
    return min([*found, *_group_rest()])


def _meminfo(file: Path) -> int:
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _group_rest() -> list[int]:
    """What control groups (version 2, as in a container) leave, where they limit memory."""
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return []
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = int(stat.get("inactive_file", 0))
    return [int(limit.read_text()) - int(used.read_text()) + cache]
