"""ADMM (Boža 2024, "Fast and Effective Weight Update for Pruned Large Language Models",
arXiv 2401.02938): few steps of a fixed penalty, the mask chosen on the way.

The symbols are the paper's: W weights scaled by the norms of their inputs, Z their sparse copy, U
the scaled multipliers, rho the penalty; rows are outputs here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prune_llm.masks import Pattern, Scope, keep_mask, zero_pruned
from prune_llm.methods.gram import ScaledGram, scaled_gram
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import Needs

RHO = 1.0
STEPS, MASK_STEPS = 20, 15


class Admm:
    """Algorithm 2; its sparsity grows step by step, along a cubic curve (eq. 7)."""

    needs = Needs.GRAM
    scope: Scope | None = "matrix"

    def solve(self, problem: Problem) -> list[Solution]:
        gram = scaled_gram(problem.input_statistics(), 0.0)
        gram_II = gram.gram_II.clone()
        gram_II.diagonal().add_(problem.damping)  # of a mean diagonal that is 1
        penalised_II = gram_II.double()
        penalised_II.diagonal().add_(RHO)
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(penalised_II)).float()
        solutions = []
        for weight_OI, pattern in zip(problem.weights_OI, problem.patterns, strict=True):
            dense_OI = weight_OI * gram.scale_I
            found_OI, keep_OI = _search(gram, inverse_II, dense_OI, dense_OI @ gram_II, pattern)
            solutions.append(Solution(zero_pruned(found_OI / gram.scale_I, keep_OI), keep_OI))
        return solutions


def _search(
    gram: ScaledGram, inverse_II: Tensor, dense_OI: Tensor, wanted_OI: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Z and its mask after all steps."""
    weight_OI, multiplier_OI = dense_OI, torch.zeros_like(dense_OI)
    keep_OI = torch.ones_like(dense_OI, dtype=torch.bool)
    for step in range(STEPS):
        target_OI = weight_OI + multiplier_OI
        if step < MASK_STEPS:
            keep_OI = _mask(gram.scores(target_OI), pattern, step)
        sparse_OI = zero_pruned(target_OI, keep_OI)
        multiplier_OI = target_OI - sparse_OI
        # (G + rho I)^-1 (G W0 + rho (Z - U))
        weight_OI = torch.add(wanted_OI, sparse_OI - multiplier_OI, alpha=RHO) @ inverse_II
    return weight_OI + multiplier_OI, keep_OI


def _mask(scores_OI: Tensor, pattern: Pattern, step: int) -> Tensor:
    """What survives so far. N:M: of the weights that it will prune, the lowest of the matrix."""
    final_OI = keep_mask(scores_OI, pattern, "matrix")
    if step + 1 == MASK_STEPS:
        return final_OI
    share = 1 - (1 - (step + 1) / MASK_STEPS) ** 3
    if pattern.m is not None:
        scores_OI = scores_OI.masked_fill(final_OI, torch.inf)
    pruned = final_OI.numel() - int(torch.count_nonzero(final_OI))
    return keep_mask(scores_OI, Pattern(share * pruned / final_OI.numel()), "matrix")
