"""Thresholds as quantiles of what the sites' inputs are: counted by bits, kept as a grid.

No shape of the distribution is assumed: the scores themselves are counted, in bins that are
consecutive float32 numbers. Shape letters: N = sites, G = points of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# bins per factor of two: 2**MANTISSA, so a threshold is exact to a thousandth of itself
MANTISSA = 10
SHIFT = 23 - MANTISSA
# scores from 2**-40 to 2**40; smaller ones count as zeros, larger ones as the largest
LOWEST, HIGHEST = (127 - 40) << MANTISSA, (127 + 40) << MANTISSA
BINS = HIGHEST - LOWEST + 2
INFINITE = 0x7F800000
GRID = 1 << 12


class ScoreHistogram:
    """Counts of the scores of one site, int64."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def update(self, scores: Tensor, name: str) -> None:
        """Count float32 scores of any shape, none of them negative.

        Raises:
            ValueError: NaN or infinite, naming the site.
        """
        bits = scores.reshape(-1).view(torch.int32)
        if bits.numel() and int(bits.max()) >= INFINITE:
            raise ValueError(
                f"site {name}: its calibration inputs are not finite; "
                "run with --dtype float32 or check the model's weights"
            )
        bins = ((bits >> SHIFT) - LOWEST + 1).clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def grid(self) -> Tensor:
        """Thresholds float64 [G + 1] under which the share k / G of the scores lies; the first is
        0. Of a site that no token reached all are 0: nothing is known, nothing is skipped."""
        if self.total == 0:
            return torch.zeros(GRID + 1, dtype=torch.float64)
        reached = self.counts.cumsum(0)
        wanted = (torch.arange(GRID + 1, dtype=torch.float64) / GRID * self.total).clamp(min=1)
        bins = torch.searchsorted(reached.double(), wanted).clamp(max=BINS - 1)
        values = _upper_edge(bins)
        values[0] = 0.0
        return values


def _upper_edge(bins: Tensor) -> Tensor:
    """The largest float32 of a bin, as float64; 0 for the bin of the zeros."""
    bits = ((bins + LOWEST) << SHIFT) - 1
    edges = bits.to(torch.int32).view(torch.float32).double()
    return torch.where(bins == 0, 0.0, edges)


@dataclass(frozen=True)
class Quantiles:
    """A grid of thresholds for each site, float64 [N, G + 1]."""

    grid_NG: Tensor

    @classmethod
    def of(cls, histograms: Sequence[ScoreHistogram]) -> Quantiles:
        return cls(torch.stack([histogram.grid() for histogram in histograms]))

    def thresholds(self, sparsities: Sequence[float]) -> list[float]:
        """One per site, linear between the points of the grid; float32 numbers."""
        places_N = torch.tensor(sparsities, dtype=torch.float64).clamp(0, 1) * GRID
        low_N = places_N.floor().long().clamp(max=GRID - 1)
        pair_N2 = self.grid_NG.gather(1, torch.stack([low_N, low_N + 1], dim=1))
        values_N = torch.lerp(pair_N2[:, 0], pair_N2[:, 1], places_N - low_N)
        return [float(value) for value in values_N.float()]
