"""The benchmarks' modules, found as when the script runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

EVAL_BENCH = Path(__file__).parents[1] / "eval" / "bench"


@contextmanager
def eval_bench(name: str) -> Iterator[ModuleType]:
    """A module of eval/bench; those beside it are found while the context lasts."""
    sys.path.insert(0, str(EVAL_BENCH))
    try:
        yield import_module(name)
    finally:
        sys.path.remove(str(EVAL_BENCH))
