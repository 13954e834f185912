"""ALPS (Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models", arXiv 2406.07831): ADMM finds the support, conjugate gradients the weights on it.

    minimise tr (B - B0) G (B - B0)^T  subject to  B = D, D in S    S: the patterns' masks

with the paper's symbols, transposed so that rows are outputs: B the weights scaled by G's diagonal
(section 3.3), D their sparse copy, V the multipliers, rho the penalty. The penalty grows while the
support still moves, quickly at first (section 3.2 and the authors' code).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_llm.masks import Pattern, Scope, keep_mask, zero_pruned
from prune_llm.methods.backsolve import backsolve
from prune_llm.methods.gram import ScaledGram, scaled_gram
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import Needs

RHO, MIN_RHO, MAX_RHO = 0.1, 1e-5, 1e6
MAX_STEPS = 300
# the penalty is looked at every so many steps
CHECK = 3
# (share of the kept weights that entered or left, by how much the penalty then grows)
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# from so many steps on the search ends at such a share
LATE, STILL = 30, 0.0003


class Alps:
    """Algorithm 1; an unstructured mask is chosen over the whole matrix."""

    needs = Needs.GRAM
    scope: Scope | None = "matrix"

    def solve(self, problem: Problem) -> list[Solution]:
        gram = scaled_gram(problem.input_statistics(), problem.damping)
        inverse = Inverse.of(gram)
        solutions = []
        for weight_OI, pattern in zip(problem.weights_OI, problem.patterns, strict=True):
            dense_OI = weight_OI * gram.scale_I
            found_OI, keep_OI = search(gram, inverse, dense_OI, pattern)
            solved_OI = backsolve(gram, dense_OI, zero_pruned(found_OI, keep_OI), keep_OI)
            solutions.append(Solution(zero_pruned(solved_OI / gram.scale_I, keep_OI), keep_OI))
        return solutions


@dataclass(frozen=True)
class Inverse:
    """(G + rho I)^-1 for any rho from one eigendecomposition G = Q L Q^T, in float64."""

    values_I: Tensor
    vectors_II: Tensor

    @classmethod
    def of(cls, gram: ScaledGram) -> Inverse:
        values_I, vectors_II = torch.linalg.eigh(gram.gram_II.double())
        return cls(values_I.clamp_min_(0.0), vectors_II)  # rounding makes some slightly negative

    def __call__(self, rho: float) -> Tensor:
        return ((self.vectors_II / (self.values_I + rho)) @ self.vectors_II.T).float()


def search(
    gram: ScaledGram, inverse: Inverse, dense_OI: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """B when the support has come to rest, and its keep-mask by the pattern, both [O, I]."""
    wanted_OI = dense_OI @ gram.gram_II
    first_OI = before_OI = _project(gram, dense_OI, pattern)
    sparse_OI = zero_pruned(dense_OI, first_OI)
    multiplier_OI = torch.zeros_like(dense_OI)
    kept = max(1, int(torch.count_nonzero(first_OI)))
    rho, moving = RHO, False
    inverse_II, scaled_OI = inverse(rho), dense_OI
    for step in range(1, MAX_STEPS + 1):
        # eq. 4: B = (G + rho I)^-1 (G B0 - V + rho D), D = P_S(B + V / rho), V += rho (B - D)
        scaled_OI = torch.add(wanted_OI, sparse_OI, alpha=rho).sub_(multiplier_OI) @ inverse_II
        target_OI = torch.add(scaled_OI, multiplier_OI, alpha=1 / rho)
        keep_OI = _project(gram, target_OI, pattern)
        sparse_OI = zero_pruned(target_OI, keep_OI)
        multiplier_OI.add_(scaled_OI - sparse_OI, alpha=rho)
        if step % CHECK:
            continue
        share = int(torch.count_nonzero(keep_OI != before_OI)) / kept
        before_OI = keep_OI
        if moving and (share == 0 or (step > LATE and share < STILL)):
            break
        moving = moving or share > GROWTH[1][0]
        if moving:
            rho = min(rho * _growth(share), MAX_RHO)
        elif rho < MIN_RHO:  # nothing moves the support: it is right as it is
            break
        else:  # too stiff to move at all: begin again with less
            rho /= 5
            sparse_OI, multiplier_OI = zero_pruned(dense_OI, first_OI), torch.zeros_like(dense_OI)
        inverse_II = inverse(rho)
    return scaled_OI, _project(gram, scaled_OI, pattern)


def _project(gram: ScaledGram, scaled_OI: Tensor, pattern: Pattern) -> Tensor:
    return keep_mask(gram.scores(scaled_OI), pattern, "matrix")


def _growth(share: float) -> float:
    return next(factor for least, factor in GROWTH if share > least)
