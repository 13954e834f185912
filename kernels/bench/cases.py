"""The names of benchmark cases, on the CPU and on a GPU."""

from __future__ import annotations

import re


def parse_case(case: str) -> tuple[float, float]:
    """W50A40 -> weight sparsity 0.5, skipped inputs 0.4."""
    match = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", case)
    if not case or match is None:
        raise SystemExit(f"case {case!r}: must look like W50A40, W50 or A50")
    pruned, skipped = (int(part or 0) / 100 for part in match.groups())
    return pruned, skipped
