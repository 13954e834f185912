"""Essential sparsity: how much can be pruned before quality drops.

The knee of a method is the largest sparsity up to which perplexity stays within a given increase
over the dense model. Between two measured sparsities the logarithm of the perplexity, which is the
negative log likelihood per token, is taken as a straight line. It bends upwards, so the knee is
rather too low. The first crossing counts, even where a higher sparsity is better again. Outside of
what was measured nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Knee:
    """Where a method's perplexity leaves the allowed increase.

    Attributes:
        relation: "at" the sparsity, "above" it, the largest that was measured, or "below" it, the
            smallest.
    """

    relation: str
    sparsity: float

    @property
    def text(self) -> str:
        if self.relation == "at":
            return f"{100 * self.sparsity:.1f}%"
        return f"{self.relation} {100 * self.sparsity:.3g}%"


def find_knee(
    curve: Iterable[tuple[float, float]], dense_nll: float, increase: float
) -> Knee | None:
    """The knee of (sparsity, negative log likelihood) pairs; None where there are none.

    Args:
        curve: in any order; a likelihood that is not finite counts as beyond the limit.
        dense_nll: of the dense model, in nats per token.
        increase: of the perplexity, as a fraction: 0.05 is 5 %.
    """
    points = sorted(curve)
    if not points:
        return None
    limit = dense_nll + math.log1p(increase)
    if not points[0][1] <= limit:
        return Knee("below", points[0][0])
    for (low, nll), (high, worse) in pairwise(points):
        if not worse <= limit:
            share = (limit - nll) / (worse - nll) if math.isfinite(worse) else 0.0
            return Knee("at", low + share * (high - low))
    return Knee("above", points[-1][0])
