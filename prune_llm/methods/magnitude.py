"""Magnitude pruning: keep the weights that are largest in absolute value, per matrix."""

from __future__ import annotations

from prune_llm.masks import Scope, keep_mask, zero_pruned
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import Needs


class Magnitude:
    """S_ij = |W_ij|, compared over the whole matrix; needs no data and updates no weight."""

    needs = Needs.NOTHING
    scope: Scope | None = "matrix"

    def solve(self, problem: Problem) -> list[Solution]:
        solutions = []
        for weight_OI, pattern in zip(problem.weights_OI, problem.patterns, strict=True):
            keep_OI = keep_mask(weight_OI.abs(), pattern, self.scope or "matrix")
            solutions.append(Solution(zero_pruned(weight_OI, keep_OI), keep_OI))
        return solutions
