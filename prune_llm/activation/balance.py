"""Sparsities across blocks and sites by what they do to the model's output ("global").

Minimised is KL(dense || gated) of the output at the same overall sparsity. At the best sparsities
it costs the same, per weight, to skip a little more at any site. What it costs is measured for all
sites at once: each of a set of measurements raises half of the sites and lowers the others, by the
columns of a Hadamard matrix, so that every measurement tells something of every site (main effects,
as in the design of experiments). Sites that cost more than the average then give sparsity to those
that cost less. Every round measures on other windows, and steps become shorter so that in the end
all rounds count alike, and the start as much as one of them: no draw of text decides.

Nothing is random: the same model and text give the same sparsities.

Why no gradients, and no search that keeps what helped: a gate jumps, and so do the gates behind it.
On a small model the derivative with the gates held fixed said little about a changed threshold;
single differences, and exchanges between sites, gained mostly what the next text took back; so did
steps twice as long as these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_llm.activation.curve import HIGHEST, Curve, Task, units
from prune_llm.activation.greedy import greedy

# tokens that a round runs, over all of its measurements, and that each measures on at least
ROUND_TOKENS, LEAST_TOKENS = 1 << 18, 4096
# rounds, and how far each raises and lowers sparsities
ROUNDS, CHANGE = 4, 0.06
# sparsities are moved by no more than this share of the target
RELATIVE = 0.2
# ln(cost per weight) grows by about so much for 1 of sparsity
STEEPNESS = 8.0
# a site's cost is taken to be within this factor of the average
TRUST = 3.0
# most that one round corrects the planned overall sparsity towards the realised one
CORRECTION = 0.005


def balance(task: Task) -> Curve:
    """A curve through the sparsities found for each target, which about realise it."""
    start = greedy(task)
    found = [(t, _Balance(task, t, start.at(t)).run()) for t in task.targets if t > 0]
    return Curve.through(len(task.gated.sites), found)


def hadamard(least: int) -> Tensor:
    """Orthogonal columns of +1 and -1, the first all +1, float64 [M, M]; M a power of two."""
    matrix_MM = torch.ones(1, 1, dtype=torch.float64)
    doubled = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix_MM) < least:
        matrix_MM = torch.kron(doubled, matrix_MM)
    return matrix_MM


@dataclass
class _Balance:
    """The search for one overall sparsity; ``shares``: of the sites, now.

    Shape letters: M = measurements of a round, U = units of sites.
    """

    task: Task
    target: float
    shares: list[float]

    def run(self) -> list[float]:
        movable = units(self.task.gated)
        change = min(CHANGE, RELATIVE * self.target)
        for number in range(ROUNDS):
            windows_ST = self._windows(number, len(movable))
            # steps of 1/2, 1/3, 1/4 ..: where the rounds point is averaged, and the start with them
            self._round(movable, windows_ST, change, 1 / (number + 2))
        return self.shares

    def _windows(self, number: int, units: int) -> Tensor:
        """Other ones in every round, from the start again when there are no more.

        The more units, the more measurements, and the fewer tokens each: what is told of a unit is
        told by all of them.
        """
        all_ST = self.task.windows_ST
        tokens = max(ROUND_TOKENS // len(hadamard(units + 1)), LEAST_TOKENS)
        count = min(max(1, tokens // all_ST.shape[1]), len(all_ST))
        start = number * count % (len(all_ST) - count + 1)
        return all_ST[start : start + count]

    def _round(
        self, movable: list[list[int]], windows_ST: Tensor, change: float, length: float
    ) -> None:
        """Measure what every unit costs, and step towards equal costs."""
        columns = len(movable) + 1
        signs_MU = hadamard(columns)[:, 1:columns]
        cost_M, realised_M = self._measure(movable, windows_ST, change * signs_MU)
        # of a unit raised by 1: what it adds to ln KL, and to the overall sparsity
        cost_U = signs_MU.T @ cost_M / (len(cost_M) * change)
        gain_U = signs_MU.T @ realised_M / (len(cost_M) * change)
        price = float(cost_U.sum() / gain_U.sum())
        planned = self.task.gated.mean(self.shares)
        if price > 0:  # else so little is skipped that nothing could be measured
            relative_U = cost_U / (gain_U.clamp(min=1e-9) * price)
            step_U = relative_U.clamp(1 / TRUST, TRUST).log() * (length / STEEPNESS)
            self.shares = self._raised(movable, -step_U)
        missing = self.target - float(realised_M.mean())
        self._plan(planned + min(max(missing, -CORRECTION), CORRECTION))

    def _measure(
        self, movable: list[list[int]], windows_ST: Tensor, changes_MU: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ln KL and realised sparsity with each row's changes, float64 [M]."""
        gated, found = self.task.gated, []
        for change_U in changes_MU:
            thresholds = self.task.quantiles.thresholds(self._raised(movable, change_U))
            found.append(gated.measure(windows_ST, thresholds))
        costs = [math.log(max(measured.kl, 1e-12)) for measured in found]
        realised = [measured.sparsity for measured in found]
        return torch.tensor(costs).double(), torch.tensor(realised).double()

    def _raised(self, movable: list[list[int]], change_U: Tensor) -> list[float]:
        """The sparsities with each unit's changed."""
        shares = list(self.shares)
        for unit, change in zip(movable, change_U.tolist(), strict=True):
            for index in unit:
                shares[index] = min(max(shares[index] + change, 0.0), HIGHEST)
        return shares

    def _plan(self, planned: float) -> None:
        """Shift all sites alike until their weighted mean is ``planned``."""
        for _ in range(50):
            missing = planned - self.task.gated.mean(self.shares)
            if abs(missing) < 1e-9:
                break
            self.shares = [min(max(s + missing, 0.0), HIGHEST) for s in self.shares]
