"""Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
arXiv 2306.11695): weights times the norm of their input, compared within each output row."""

from __future__ import annotations

from prune_llm.masks import Scope, keep_mask, zero_pruned
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import Needs


class Wanda:
    """S_ij = |W_ij| * ||X_j||_2  (eq. 1 of the paper); updates no weight."""

    needs = Needs.NORMS
    scope: Scope | None = "row"

    def solve(self, problem: Problem) -> list[Solution]:
        norms_I = problem.input_statistics().norms_I()
        solutions = []
        for weight_OI, pattern in zip(problem.weights_OI, problem.patterns, strict=True):
            scores_OI = weight_OI.abs().mul_(norms_I)
            keep_OI = keep_mask(scores_OI, pattern, self.scope or "row")
            solutions.append(Solution(zero_pruned(weight_OI, keep_OI), keep_OI))
        return solutions
