"""The best weights on a given support, by conjugate gradients (Meng et al. 2024, "ALPS",
arXiv 2406.07831, algorithm 2): every output row is a least-squares problem of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_llm.methods.gram import ScaledGram

STEPS = 10
# a row whose residual shrank by this is done
TOLERANCE = 1e-4
# share of its error that a row must lose, or it stays as it was: less is rounding
LEAST_GAIN = 1e-9


def backsolve(
    gram: ScaledGram, dense_OI: Tensor, start_OI: Tensor, keep_OI: Tensor, steps: int = STEPS
) -> Tensor:
    """argmin_B tr (B - B0) G (B - B0)^T with B zero outside ``keep_OI``, approximately.

    G has ones on its diagonal, so the Jacobi preconditioner of the paper is the identity here. Each
    step lowers the error r G r^T of a row by step x size, which is how its gain is known.

    Args:
        dense_OI: B0, scaled weights; start_OI: where to begin, zero outside the support.
    """
    solution_OI = start_OI.clone()
    lost_OI = dense_OI - start_OI
    residual_OI = lost_OI @ gram.gram_II
    error_O1 = (lost_OI * residual_OI).sum(dim=1, keepdim=True)
    residual_OI.masked_fill_(~keep_OI, 0.0)
    direction_OI = residual_OI.clone()
    size_O1 = _square(residual_OI)
    enough_O1, gain_O1 = size_O1 * TOLERANCE**2, torch.zeros_like(size_O1)
    for _ in range(steps):
        image_OI = (direction_OI @ gram.gram_II).masked_fill_(~keep_OI, 0.0)
        step_O1 = _divide(size_O1, (direction_OI * image_OI).sum(dim=1, keepdim=True))
        solution_OI.addcmul_(step_O1, direction_OI)
        gain_O1 += step_O1 * size_O1
        residual_OI.addcmul_(step_O1, image_OI, value=-1)
        before_O1, size_O1 = size_O1, _square(residual_OI)
        if bool((size_O1 <= enough_O1).all()):
            break
        direction_OI = torch.addcmul(residual_OI, _divide(size_O1, before_O1), direction_OI)
    return torch.where(gain_O1 > LEAST_GAIN * error_O1, solution_OI, start_OI)


def _square(values_OI: Tensor) -> Tensor:
    return values_OI.square().sum(dim=1, keepdim=True)


def _divide(above: Tensor, below: Tensor) -> Tensor:
    """Zero where nothing is left to do."""
    return torch.where(below > 0, above / below.clamp_min(1e-38), 0.0)
