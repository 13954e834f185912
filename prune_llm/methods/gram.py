"""The Gram matrix as ADMM solvers want it: damped, and scaled to a diagonal of ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_llm.statistics import InputStatistics


@dataclass(frozen=True)
class ScaledGram:
    """G = C (H + l I) C with C = diag(H + l I)^-1/2, for weights B = W C^-1 (Jacobi scaling).

    An input that was zero on every token gets an equation of its own, b = b0, and no part in any
    other: it keeps its weights where they are kept at all.

    Attributes:
        gram_II: G, float32, ones on its diagonal.
        scale_I: the diagonal of C^-1, float32, positive.
        dead_I: inputs that were zero on every token.
    """

    gram_II: Tensor
    scale_I: Tensor
    dead_I: Tensor

    def scores(self, scaled_OI: Tensor) -> Tensor:
        """|B|, what a projection keeps the largest of; weights of dead inputs come last."""
        return scaled_OI.abs().masked_fill_(self.dead_I, -1.0)

    def error_O(self, change_OI: Tensor) -> Tensor:
        """Squared error of each output row for a change of B: the diagonal of E G E^T, float64."""
        return ((change_OI @ self.gram_II) * change_OI).sum(dim=1, dtype=torch.float64)


def scaled_gram(statistics: InputStatistics, damping: float) -> ScaledGram:
    """Args: damping: l as a fraction of the mean diagonal of H over inputs that are not dead.

    Raises:
        ValueError: the Gram matrix is not finite.
    """
    gram_II = statistics.gram_II
    diagonal_I = gram_II.diagonal()
    if not bool(torch.isfinite(diagonal_I).all()):
        raise ValueError("the Gram matrix is not finite: the calibration activations overflowed")
    dead_I = diagonal_I == 0
    ridge = 0.0 if bool(dead_I.all()) else damping * float(diagonal_I[~dead_I].mean())
    scale_I = (diagonal_I + ridge).masked_fill(dead_I, 1.0).sqrt()
    scaled_II = gram_II / scale_I / scale_I[:, None]
    scaled_II.diagonal().fill_(1.0)
    return ScaledGram(scaled_II, scale_I, dead_I)
