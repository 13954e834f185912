"""RIA (Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR 2024): a weight counts by its share of its row and of its column."""

from __future__ import annotations

from torch import Tensor

from prune_llm.masks import Scope, keep_mask, zero_pruned
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import Needs

# a, the power of the input norm
POWER = 0.5


class Ria:
    """S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a; updates no weight."""

    needs = Needs.NORMS
    scope: Scope | None = "matrix"

    def solve(self, problem: Problem) -> list[Solution]:
        norms_I = problem.input_statistics().norms_I().pow(POWER)
        solutions = []
        for weight_OI, pattern in zip(problem.weights_OI, problem.patterns, strict=True):
            scores_OI = relative_importance(weight_OI).mul_(norms_I)
            keep_OI = keep_mask(scores_OI, pattern, "matrix")
            solutions.append(Solution(zero_pruned(weight_OI, keep_OI), keep_OI))
        return solutions


def relative_importance(weight_OI: Tensor) -> Tensor:
    """Share of the column's and of the row's sum of magnitudes; zero in rows of zeros."""
    magnitude_OI = weight_OI.abs()
    tiny = 1e-38  # a sum below it is of zeros
    of_column_OI = magnitude_OI / magnitude_OI.sum(dim=0).clamp_min(tiny)
    return of_column_OI.add_(magnitude_OI / magnitude_OI.sum(dim=1, keepdim=True).clamp_min(tiny))
