"""Where to prune how much: a sparsity for each linear, under one exact budget of weights.

Every allocation looks at all linears of the dense model before the first is pruned: at their
weights, or with calibration data block by block. What it returns adds up to the budget exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from prune_llm.masks import Pattern
from prune_llm.methods import METHODS, Problem
from prune_llm.statistics import InputStatistics, Needs

# no linear loses more, unless all are asked to
MOST = 0.95
# OWL: a score so many times the block's mean is an outlier (M), and how far the sparsities of
# blocks may lie from their mean (lambda)
OUTLIER, OWL_RANGE = 5.0, 0.08
# error: levels around the asked sparsity on which a linear is solved, and on how many of its rows
LEVELS, ERROR_ROWS = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15), 256
# magnitudes: bins of the float32 bits, 8 of the exponent and 4 of the mantissa
BIN_SHIFT, BINS = 19, 4096


@dataclass(frozen=True)
class SurveyedSite:
    """Linears that share an input of the dense model.

    Attributes:
        weights_OI: float32 [O, I].
        changes: what another weight of a linear does to its block's output: the relative squared
            change, mean over tokens.
    """

    names: tuple[str, ...]
    weights_OI: tuple[Tensor, ...]
    statistics: InputStatistics
    changes: tuple[Callable[[Tensor], float], ...]


@dataclass(frozen=True)
class Survey:
    """What an allocation may look at.

    Attributes:
        sizes: weights of each linear by name, in the model's order.
        sparsity: of all of them together.
        method, damping, column_block: what will prune them.
        weights: reads them one after the other, float32 [O, I].
        blocks: runs the dense model block by block; the sites of each.
        record: what the report shall tell.
    """

    sizes: dict[str, int]
    sparsity: float
    method: str
    damping: float
    column_block: int
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    blocks: Callable[[Needs], Iterator[list[SurveyedSite]]]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """Weights to prune in all."""
        return round(sum(self.sizes.values()) * self.sparsity)

    @property
    def most(self) -> float:
        return max(MOST, self.sparsity)


class Allocation(Protocol):
    @property
    def needs(self) -> Needs:
        """Of the dense model's inputs."""

    def counts(self, survey: Survey) -> dict[str, int]:
        """Weights that each linear loses; their sum is the budget."""


class Magnitudes:
    """One threshold for the scores of all linears; no linear loses more than 95 %."""

    needs = Needs.NOTHING

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        self._scores = scores

    def counts(self, survey: Survey) -> dict[str, int]:
        below = [
            _count_below(self._scores(weight_OI), survey.most) for _, weight_OI in survey.weights()
        ]
        return _cut(survey.sizes, torch.stack(below), survey.budget)


def magnitude_scores(weight_OI: Tensor) -> Tensor:
    """|w|, compared over the whole model."""
    return weight_OI.abs()


def lamp_scores(weight_OI: Tensor) -> Tensor:
    """w_u^2 / sum over |w_v| >= |w_u| of w_v^2 (Lee et al. 2021, arXiv 2010.07611, eq. 4)."""
    squares = weight_OI.flatten().double().square().sort().values
    return squares / squares.flip(0).cumsum(0).flip(0).clamp_min(1e-300)


def _count_below(scores: Tensor, most: float) -> Tensor:
    """How many scores lie below each bin's end, at most a share ``most`` of all. int32 [BINS]."""
    bins = scores.flatten().float().view(torch.int32) >> BIN_SHIFT
    below = torch.bincount(bins, minlength=BINS).cumsum(0)
    return below.clamp_(max=int(scores.numel() * most + 1e-6)).to("cpu", torch.int32)


def _cut(sizes: dict[str, int], below_LB: Tensor, budget: int) -> dict[str, int]:
    """Weights below the threshold that prunes ``budget``; inside its bin they lie evenly."""
    total_B = below_LB.sum(dim=0, dtype=torch.int64)
    end = int(torch.searchsorted(total_B, budget))
    if end == BINS:  # rounding of the floors: all give what they may
        end -= 1
    low_L = below_LB[:, end - 1] if end else torch.zeros_like(below_LB[:, 0])
    low, high = int(low_L.sum(dtype=torch.int64)), int(total_B[end])
    part = (budget - low) / max(high - low, 1)
    inside_L = (below_LB[:, end] - low_L).double()
    wanted = (low_L.double() + part * inside_L).tolist()
    return rounded(sizes, dict(zip(sizes, wanted, strict=True)), budget)


class Owl:
    """OWL (Yin et al. 2023, "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175, section 3.2).

    D_l is the share of a block's Wanda scores that exceed M times their mean. Blocks with more
    outliers are pruned less: s_l = s - (r_l - mean r) with
    r_l = 2 lambda (D_l - min D) / (max D - min D).
    All linears of a block get the same sparsity, and here the mean is weighted by their sizes.
    """

    needs = Needs.NORMS

    def counts(self, survey: Survey) -> dict[str, int]:
        shares: list[float] = []
        members: list[list[str]] = []
        for sites in survey.blocks(self.needs):
            shares.append(outlier_share(sites))
            members.append([name for site in sites for name in site.names])
        survey.record["outlier_share"] = shares
        spread = max(shares) - min(shares)
        wanted: dict[str, float] = {}
        for share, names in zip(shares, members, strict=True):
            raised = 2 * OWL_RANGE * (share - min(shares)) / spread if spread > 0 else 0.0
            wanted |= dict.fromkeys(names, survey.sparsity - raised)
        return shifted(survey, wanted)


def outlier_share(sites: list[SurveyedSite]) -> float:
    """D_l: share of |W_ij| ||X_j|| that exceeds M times their mean over the block."""
    total, count = 0.0, 0
    for scores_OI in _wanda_scores(sites):
        total += float(scores_OI.sum(dtype=torch.float64))
        count += scores_OI.numel()
    least = OUTLIER * total / max(count, 1)
    above = sum(int(torch.count_nonzero(scores_OI > least)) for scores_OI in _wanda_scores(sites))
    return above / max(count, 1)


def _wanda_scores(sites: list[SurveyedSite]) -> Iterator[Tensor]:
    for site in sites:
        # per token: experts see more or fewer of them
        norms_I = site.statistics.norms_I() / max(site.statistics.tokens, 1) ** 0.5
        for weight_OI in site.weights_OI:
            yield weight_OI.abs() * norms_I


class Error:
    """The least sum of errors: every linear is solved at several levels of sparsity from one
    factorisation, and the budget goes where the next weight costs least.

    A linear's error counts by what it does to the output of its block, measured once: the same
    relative error of a query harms more than that of a value, and an early block's output is small.
    """

    needs = Needs.GRAM

    def counts(self, survey: Survey) -> dict[str, int]:
        levels = [min(max(survey.sparsity + change, 0.0), survey.most) for change in LEVELS]
        levels = sorted(set(levels))
        curves: dict[str, list[tuple[int, float]]] = {}
        for sites in survey.blocks(self.needs | METHODS[survey.method].needs):
            for site in sites:
                curves |= error_curves(site, levels, survey)
        survey.record["levels"] = levels
        survey.record["errors"] = {name: [e for _, e in curve] for name, curve in curves.items()}
        ordered = {name: curves[name] for name in survey.sizes}
        wanted = {name: float(n) for name, n in cheapest(ordered, survey.budget).items()}
        return rounded(survey.sizes, wanted, survey.budget)


def error_curves(
    site: SurveyedSite, levels: list[float], survey: Survey
) -> dict[str, list[tuple[int, float]]]:
    """(weights pruned, relative squared change of the block) of each linear at each level.

    Measured on evenly spaced rows of it, at most 256, and on the whole Gram matrix.
    """
    if site.statistics.tokens == 0:  # an expert that no token reached: what was asked for
        return {name: [(round(survey.sizes[name] * survey.sparsity), 0.0)] for name in site.names}
    rows = [weight_OI[:: -(-len(weight_OI) // ERROR_ROWS)] for weight_OI in site.weights_OI]
    curves = {}
    factors = _harm(site, survey.sparsity)
    gram_II = site.statistics.gram_II
    patterns = tuple(Pattern(level) for level in levels)
    repeated = tuple(weight_OI for weight_OI in rows for _ in levels)
    problem = Problem(
        repeated, patterns * len(rows), site.statistics, survey.damping, survey.column_block
    )
    solutions = METHODS[survey.method].solve(problem)
    for place, (name, weight_OI) in enumerate(zip(site.names, rows, strict=True)):
        whole = _square(weight_OI, gram_II)
        solved = solutions[place * len(levels) : (place + 1) * len(levels)]
        lost = [_square(weight_OI - s.weight_OI, gram_II) for s in solved]
        pruned = [round(survey.sizes[name] * level) for level in levels]
        errors = [factors[place] * error / whole if whole > 0 else 0.0 for error in lost]
        curves[name] = list(zip(pruned, errors, strict=True))
    return curves


def _harm(site: SurveyedSite, sparsity: float) -> list[float]:
    """How far a relative error of each linear changes the block: one over the other for Wanda."""
    problem = Problem(
        site.weights_OI, (Pattern(sparsity),) * len(site.names), site.statistics, 0.0, 1
    )
    factors = []
    for weight_OI, change, solution in zip(
        site.weights_OI, site.changes, METHODS["wanda"].solve(problem), strict=True
    ):
        gram_II = site.statistics.gram_II
        whole, lost = (_square(w, gram_II) for w in (weight_OI, weight_OI - solution.weight_OI))
        factors.append(change(solution.weight_OI) * whole / lost if lost > 0 else 0.0)
    return factors


def _square(weight_OI: Tensor, gram_II: Tensor) -> float:
    """||W X||^2 = tr W H W^T."""
    return float(((weight_OI @ gram_II) * weight_OI).sum(dtype=torch.float64))


ALLOCATIONS: dict[str, Allocation | None] = {
    "uniform": None,
    "owl": Owl(),
    "error": Error(),
    "global-magnitude": Magnitudes(magnitude_scores),
    "lamp": Magnitudes(lamp_scores),
}


# -- budgets ---------------------------------------------------------------------------------


def shifted(survey: Survey, wanted: dict[str, float]) -> dict[str, int]:
    """Sparsities moved by one common amount, inside [0, most], until they add up to the budget."""

    def counts(shift: float) -> dict[str, float]:
        return {
            name: size * min(max(wanted[name] + shift, 0.0), survey.most)
            for name, size in survey.sizes.items()
        }

    low, high = -1.0 - max(wanted.values()), 1.0 - min(wanted.values())
    for _ in range(100):  # halves it to the last bit
        middle = (low + high) / 2
        low, high = (
            (middle, high) if sum(counts(middle).values()) < survey.budget else (low, middle)
        )
    return rounded(survey.sizes, counts(high), survey.budget)


def rounded(sizes: dict[str, int], wanted: dict[str, float], budget: int) -> dict[str, int]:
    """Whole numbers that add up to the budget, none further from what is wanted than it must be.

    Each is rounded down, and those with the largest remainders get one more, the first of equal
    ones first.
    """
    counts = {name: min(int(value), sizes[name]) for name, value in wanted.items()}
    by_remainder = sorted(counts, key=lambda name: counts[name] - wanted[name])
    missing = budget - sum(counts.values())
    while missing != 0:
        step = 1 if missing > 0 else -1
        for name in by_remainder if step > 0 else by_remainder[::-1]:
            if missing != 0 and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts


def cheapest(curves: dict[str, list[tuple[int, float]]], budget: int) -> dict[str, int]:
    """Prune where the next weight costs least, along the lower convex hull of each curve.

    For convex curves this is the least sum of errors, and for others that of their hulls. Equal
    costs go to the linear that comes first. The budget must lie within what the curves span; by
    less than a weight for each curve it may lie outside, where the ends were rounded.
    """
    counts = {name: curve[0][0] for name, curve in curves.items()}
    steps = []
    for order, (name, curve) in enumerate(curves.items()):
        for (pruned, error), (more, worse) in pairwise(lower_hull(curve)):
            steps.append(((worse - error) / (more - pruned), order, more - pruned, name))
    missing = budget - sum(counts.values())
    for _, _, length, name in sorted(steps):
        taken = min(length, max(missing, 0))
        counts[name] += taken
        missing -= taken
    assert abs(missing) <= len(curves)
    return counts


def lower_hull(curve: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """The corners of the largest convex function below the points, from left to right."""
    hull: list[tuple[int, float]] = []
    for point in sorted(set(curve)):
        if hull and hull[-1][0] == point[0]:
            continue
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_down(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])
