"""Random pruning: the baseline that any criterion must beat."""

from __future__ import annotations

import torch

from prune_llm.masks import Scope, keep_mask, zero_pruned
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import Needs


class Random:
    """S_ij uniform, from the run's seed and the site; compared over the whole matrix."""

    needs = Needs.NOTHING
    scope: Scope | None = "matrix"

    def solve(self, problem: Problem) -> list[Solution]:
        generator = torch.Generator().manual_seed(problem.seed)  # on the CPU: alike on all devices
        solutions = []
        for weight_OI, pattern in zip(problem.weights_OI, problem.patterns, strict=True):
            scores_OI = torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
            keep_OI = keep_mask(scores_OI, pattern, "matrix")
            solutions.append(Solution(zero_pruned(weight_OI, keep_OI), keep_OI))
        return solutions
