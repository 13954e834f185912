"""What the steps of a decoder did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prune_llm.activation.levels import DENSE


@dataclass(frozen=True)
class DecodeStatistics:
    """What the decode steps so far did.

    Attributes:
        active: share of the linears' inputs that counted, weighted by the weights they meet; None
            where nothing was counted. read: share of the channels that were read for it: more than
            active where several rows ran together.
        drafted, accepted: tokens proposed by a draft level, and how many of them were right.
        ways: on a GPU, which way the products of each shape and batch take, by measurement.
    """

    level: str = DENSE
    active: float | None = None
    read: float | None = None
    drafted: int = 0
    accepted: int = 0
    ways: tuple[dict[str, Any], ...] = ()
