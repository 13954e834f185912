"""How an overall sparsity is spread over the sites: a curve of site sparsities."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from prune_llm.activation.measure import GatedModel
from prune_llm.activation.quantiles import Quantiles
from prune_llm.experts import without_index

# a site is never skipped altogether: a token that keeps no input of it computes nothing there
HIGHEST = 0.98


@dataclass(frozen=True)
class Curve:
    """Site sparsities as a function of the overall one, straight between its anchors.

    Attributes:
        anchors: pairs of an overall sparsity and the vector [sites] that stands for it, from
            (0, zeros) to (1, ones). Where the vectors' weighted means are the overall sparsities,
            they are so between the anchors too.
    """

    anchors: tuple[tuple[float, tuple[float, ...]], ...]

    @classmethod
    def through(cls, sites: int, points: Sequence[tuple[float, Sequence[float]]]) -> Curve:
        """The curve through these points, from nothing to everything."""
        inner = sorted((overall, tuple(shares)) for overall, shares in points)
        return cls(((0.0, (0.0,) * sites), *inner, (1.0, (1.0,) * sites)))

    def at(self, overall: float) -> list[float]:
        """Sparsities of the sites for an overall sparsity in [0, 1]."""
        place = bisect_right([anchor for anchor, _ in self.anchors], overall)
        place = min(max(place, 1), len(self.anchors) - 1)
        (low, below), (high, above) = self.anchors[place - 1], self.anchors[place]
        part = (overall - low) / (high - low)
        return [a + (b - a) * part for a, b in zip(below, above, strict=True)]


@dataclass(frozen=True)
class Task:
    """What an allocation is made for.

    Attributes:
        quantiles: of the scores on the dense level.
        windows_ST: token ids int64 [S, T] to measure on.
        targets: the overall sparsities the curve is wanted for, ascending.
    """

    gated: GatedModel
    quantiles: Quantiles
    windows_ST: Tensor
    targets: tuple[float, ...]


def units(gated: GatedModel) -> list[list[int]]:
    """Sites whose sparsities move together: one each, but the experts of a block by kind.

    A single expert is a small part of the whole and sees few tokens; alone it cannot be judged.
    """
    grouped: dict[str, list[int]] = {}
    for index, site in enumerate(gated.sites):
        grouped.setdefault(without_index(site.name), []).append(index)
    return list(grouped.values())
