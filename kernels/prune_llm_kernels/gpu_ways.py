"""The ways a product may take, and the copies of a weight that some of them need.

Shape letters: B = rows, I = input features, O = output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

DENSE, PACKED, JOINT, LISTED, SEMI_STRUCTURED = "dense", "packed", "joint", "listed", "2:4"
COPIED = frozenset({DENSE, SEMI_STRUCTURED})  # ways of weights that are not packed any more
_LEAST_ROWS = 8  # of torch's semi-structured product


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """Which way the products of a weight take, by their rows.

    Attributes:
        out_features: of the weight, or of all weights that lie together with it.
        dense_IO: a dense copy, in channel order. semi_OI: one for torch's 2:4 product.
        chosen: rows that were measured, and the way that was best.
    """

    out_features: int
    dense_IO: Tensor | None
    semi_OI: Tensor | None
    chosen: Mapping[int, str]

    def way(self, rows: int) -> str | None:
        """Of so many rows: that of the least measured number that is not smaller, or the last."""
        if not self.chosen:
            return None
        return self.chosen[min((n for n in self.chosen if n >= rows), default=max(self.chosen))]

    def product(self, way: str, x_BI: Tensor) -> Tensor:
        """x W^T by a way that needs a copy, [B, O]."""
        if way == DENSE:
            assert self.dense_IO is not None
            return F.linear(x_BI, self.dense_IO.T)
        assert way == SEMI_STRUCTURED and self.semi_OI is not None
        rows = len(x_BI)
        missing = -rows % _LEAST_ROWS
        padded_BI = F.pad(x_BI, (0, 0, 0, missing)) if missing else x_BI
        return F.linear(padded_BI, self.semi_OI)[:rows]
