"""DSnoT (Zhang et al. 2023, "Dynamic Sparse No Training", arXiv 2310.08915): a mask of Wanda is
improved by swaps, without touching a weight.

Leaving out weights shifts the mean of an output. A swap regrows a weight that shifts it back and
prunes one that shifts it further back, until the mean is right or no swap brings it nearer. Each
swap stays in its output row, and for N:M in its group, so counts and patterns hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prune_llm.masks import Pattern, Scope, keep_mask, zero_pruned
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import InputStatistics, Needs

# swaps of a row at most (the paper's T), and the mean shift that is small enough (its epsilon, of
# sums over 2048 tokens)
CYCLES, ENOUGH = 50, 0.1 / 2048


class DSnoT:
    """Algorithm 1 on Wanda's mask; only swaps that bring the mean nearer are taken."""

    needs = Needs.MEANS
    scope: Scope | None = "row"

    def solve(self, problem: Problem) -> list[Solution]:
        statistics = problem.input_statistics()
        norms_I = statistics.norms_I()
        solutions = []
        for weight_OI, pattern in zip(problem.weights_OI, problem.patterns, strict=True):
            wanda_OI = weight_OI.abs() * norms_I
            keep_OI = keep_mask(wanda_OI, pattern, "row")
            keep_OI = swapped(weight_OI, keep_OI, wanda_OI, statistics, pattern)
            solutions.append(Solution(zero_pruned(weight_OI, keep_OI), keep_OI))
        return solutions


def swapped(
    weight_OI: Tensor, keep_OI: Tensor, wanda_OI: Tensor, statistics: InputStatistics, p: Pattern
) -> Tensor:
    """The keep-mask after all swaps."""
    mean_I, variance_I = statistics.moments()
    shift_OI = weight_OI * mean_I  # D_ij = W_ij E[X_j]
    missing_O1 = shift_OI.masked_fill(keep_OI, 0.0).sum(dim=1, keepdim=True)
    group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device) // (p.m or len(mean_I))
    keep_OI, free_OI = keep_OI.clone(), torch.ones_like(keep_OI)  # free: not looked at yet
    rows = torch.arange(len(keep_OI), device=keep_OI.device)
    for _ in range(CYCLES):
        toward_OI = shift_OI * missing_O1.sign()
        # grow: the pruned weight that brings most back, over the variance of its input
        growable_OI = ~keep_OI & free_OI & (toward_OI > 0)
        gain_OI = (toward_OI / variance_I).masked_fill_(~growable_OI, -torch.inf)
        grown_O = gain_OI.argmax(dim=1)
        # prune: the kept weight of lowest Wanda score whose loss brings the mean nearer too
        prunable_OI = keep_OI & free_OI & (toward_OI < 0)
        prunable_OI &= group_I == group_I[grown_O, None]
        cost_OI = wanda_OI.masked_fill(~prunable_OI, torch.inf)
        pruned_O = cost_OI.argmin(dim=1)
        after_O = missing_O1[:, 0] - shift_OI[rows, grown_O] + shift_OI[rows, pruned_O]
        nearer_O = (after_O.abs() < missing_O1[:, 0].abs()) & prunable_OI[rows, pruned_O]
        possible_O = growable_OI[rows, grown_O] & (missing_O1[:, 0].abs() > ENOUGH)
        if not bool(possible_O.any()):
            break
        taken = rows[nearer_O & possible_O]
        keep_OI[taken, grown_O[taken]], keep_OI[taken, pruned_O[taken]] = True, False
        missing_O1[taken, 0] = after_O[taken]
        free_OI[rows[possible_O], grown_O[possible_O]] = False  # taken or not: never again
        free_OI[taken, pruned_O[taken]] = False
    return keep_OI
