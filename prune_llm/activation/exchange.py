"""Sparsities across blocks and sites by what they do to the model's output ("global").

Starts from the greedy sparsities. Minimised is KL(dense || gated) of the output at the same overall
sparsity, first by balancing, then by exchanging:

Balance: at the best sparsities it costs the same, per weight, to skip a little more at any site.
What it costs is measured for all sites at once: each of a set of measurements raises half of the
sites and lowers the others, by the columns of a Hadamard matrix, so that every measurement tells
something of every site (main effects, as in the design of experiments). Sites that cost more than
the others then give sparsity to those that cost less.

Exchange: a group of sites gives up sparsity that all others take over, or the other way round; what
lowers the KL is kept. Groups are the sites of one kind, those of one block, single sites. Steps
grow where they helped and shrink where they did not.

Nothing is random and every comparison is strict: the same model and text give the same sparsities.

Why no gradients, and no differences site by site: a gate jumps, and so do the gates behind it. On a
small model the derivative with the gates held fixed said little about a changed threshold, and
single differences were mostly noise; main effects average it out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prune_llm.activation.curve import HIGHEST, Curve, Task, units
from prune_llm.activation.greedy import greedy
from prune_llm.experts import without_index

# tokens the KL is measured on
KL_TOKENS = 8192
# rounds of balancing: how far sparsities are raised and lowered in each
ROUNDS = (0.06, 0.05, 0.04, 0.03)
# ln(cost per weight) grows by about so much for 1 of sparsity; lengths of step that are tried
STEEPNESS = 8.0
LENGTHS = (0.4, 0.8, 1.2)
# a site's cost is taken to be within this factor of the average
TRUST = 5.0
# measurements for each unit of sites while exchanging
MEASUREMENTS = 8
# change of a group's sparsity: at first, at most, and where an exchange is over
FIRST_STEP, LARGEST_STEP, LAST_STEP = 0.04, 0.15, 0.01
GROW, SHRINK = 1.3, 0.5
# smallest gain in ln KL that counts
GAIN = 1e-4
# difference in overall sparsity from which the price of sparsity is taken
PRICE_STEP = 0.02


def exchange(task: Task) -> Curve:
    """A curve through the best sparsities found for each target."""
    start = greedy(task)
    # one tensor for all measurements: the dense level's answers to it are kept
    windows = max(1, KL_TOKENS // task.windows_ST.shape[1])
    task = replace(task, windows_ST=task.windows_ST[:windows])
    found: list[tuple[float, list[float]]] = []
    for target in task.targets:
        if target > 0:
            curves = [start, Curve.through(len(task.gated.sites), found)]
            found.append((target, _Exchange.start(task, target, curves).run()))
    return Curve.through(len(task.gated.sites), found)


@dataclass
class _Group:
    """Sites that change together, by how much, and which way helped last."""

    sites: frozenset[int]
    step: float = FIRST_STEP
    sign: int = 1


@dataclass
class _Exchange:
    """The search for one overall sparsity.

    Attributes:
        price: d ln KL / d overall sparsity.
        cost: of ``shares``, see `_cost`.
        left: measurements that exchanging may still make.
    """

    task: Task
    target: float
    price: float
    shares: list[float]
    cost: float = math.inf
    left: int = 0
    groups: list[_Group] = field(default_factory=list)

    @classmethod
    def start(cls, task: Task, target: float, curves: list[Curve]) -> _Exchange:
        """From the best of the curves. The price of sparsity is the slope of the first."""
        search = cls(task, target, 0.0, curves[0].at(target))
        kl, sparsity = search._measure(search.shares)
        less_kl, less = search._measure(curves[0].at(max(target - PRICE_STEP, target / 2)))
        search.price = max(math.log(kl / less_kl) / max(sparsity - less, 1e-6), 0.0)
        search._take_best([curve.at(target) for curve in curves])
        search.groups = _groups(task)
        search.left = MEASUREMENTS * len(units(task.gated))
        return search

    def run(self) -> list[float]:
        for change in ROUNDS:
            self._balance(min(change, self.target / 4))
        while self.left > 0 and any(group.step >= LAST_STEP for group in self.groups):
            for group in self.groups:
                if self.left > 0 and group.step >= LAST_STEP:
                    self._try(group)
        return self.shares

    def _take_best(self, candidates: list[list[float]]) -> None:
        for shares in candidates:
            cost = self._cost(shares)
            if cost < self.cost - GAIN:
                self.cost, self.shares = cost, shares

    def _balance(self, change: float) -> None:
        """One round: what every unit costs, and a step towards equal costs where that helps."""
        movable = units(self.task.gated)
        signs_MU = hadamard(len(movable) + 1)[:, 1 : len(movable) + 1]
        found = [self._measure(self._raised(movable, change * row)) for row in signs_MU]
        log_kl_M = torch.tensor([math.log(kl) for kl, _ in found], dtype=torch.float64)
        realised_M = torch.tensor([sparsity for _, sparsity in found], dtype=torch.float64)
        # of a unit raised by 1: what it adds to ln KL, and to the overall sparsity
        cost_U = signs_MU.T @ log_kl_M / (len(found) * change)
        gain_U = signs_MU.T @ realised_M / (len(found) * change)
        if not (cost_U.sum() > 0 and gain_U.sum() > 0):
            return  # so little sparsity that it costs nothing that could be measured
        self.price = float(cost_U.sum() / gain_U.sum())
        excess_U = (cost_U / (gain_U.clamp(min=1e-9) * self.price)).clamp(1 / TRUST, TRUST).log()
        steps = [length / STEEPNESS * excess_U for length in LENGTHS]
        self._take_best([self._at_target(self._raised(movable, -step)) for step in steps])

    def _raised(self, movable: list[list[int]], change_U: Tensor) -> list[float]:
        """The sparsities with each unit's changed."""
        shares = list(self.shares)
        for unit, change in zip(movable, change_U.tolist(), strict=True):
            for index in unit:
                shares[index] = min(max(shares[index] + change, 0.0), HIGHEST)
        return shares

    def _try(self, group: _Group) -> None:
        for sign in (group.sign, -group.sign):
            shares = self._moved(group.sites, sign * group.step)
            cost = self._cost(shares)
            self.left -= 1
            if cost < self.cost - GAIN:
                self.cost, self.shares, group.sign = cost, shares, sign
                group.step = min(group.step * GROW, LARGEST_STEP)
                return
        group.step *= SHRINK

    def _moved(self, chosen: frozenset[int], change: float) -> list[float]:
        """The chosen sites changed, the others shifted for it."""
        moved = [s + change if i in chosen else s for i, s in enumerate(self.shares)]
        return self._at_target(moved)

    def _at_target(self, shares: list[float]) -> list[float]:
        """All shifted alike until the weighted mean is the target."""
        moved = [min(max(s, 0.0), HIGHEST) for s in shares]
        for _ in range(50):
            missing = self.target - self.task.gated.mean(moved)
            if abs(missing) < 1e-9:
                break
            moved = [min(max(s + missing, 0.0), HIGHEST) for s in moved]
        return moved

    def _cost(self, shares: list[float]) -> float:
        """ln KL, corrected to the target: what is realised differs a little from the plan."""
        kl, sparsity = self._measure(shares)
        return math.log(kl) + self.price * (self.target - sparsity)

    def _measure(self, shares: list[float]) -> tuple[float, float]:
        task = self.task
        measured = task.gated.measure(task.windows_ST, task.quantiles.thresholds(shares))
        return max(measured.kl, 1e-12), measured.sparsity


def hadamard(least: int) -> Tensor:
    """Orthogonal columns of +1 and -1, the first all +1, float64 [M, M]; M a power of two."""
    matrix_MM = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix_MM) < least:
        matrix_MM = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), matrix_MM)
    return matrix_MM


def _groups(task: Task) -> list[_Group]:
    """Kinds, blocks and units; a group that is another one, or everything, is left out."""
    sites = task.gated.sites
    kinds: dict[str, set[int]] = {}
    blocks: dict[int, set[int]] = {}
    for index, site in enumerate(sites):
        kinds.setdefault(_kind(site.name), set()).add(index)
        blocks.setdefault(site.block, set()).add(index)
    found: list[frozenset[int]] = []
    for group in (*kinds.values(), *blocks.values(), *units(task.gated)):
        members = frozenset(group)
        if members not in found and len(members) < len(sites):
            found.append(members)
    return [_Group(members) for members in found]


def _kind(name: str) -> str:
    """``model.layers.3.mlp.down_proj`` -> ``model.layers.*.mlp.down_proj``."""
    return re.sub(r"\.\d+\.", ".*.", without_index(name), count=1)
