"""Sparsities across blocks and sites by what they do to the model's output ("global").

Starts from the greedy sparsities and exchanges: one group of sites gives up sparsity that all
others take over, or the other way round, at the same overall sparsity; an exchange that lowers
KL(dense || gated) of the model's output is kept. Groups are first the sites of one kind in all
blocks, then those of one block, then single sites, so that a deep model moves at once as well.
Steps grow where they helped and shrink where they did not. Nothing is random and every comparison
is strict: the same model and text give the same sparsities.

Why no gradients: a gate jumps, and so do the gates behind it. Measured on a small model, the
derivative of the KL with the gates held fixed has little to do with what a changed threshold does.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from prune_llm.activation.curve import HIGHEST, Curve, Task, units
from prune_llm.activation.greedy import greedy
from prune_llm.experts import without_index

# tokens the KL is measured on; measurements for each unit of sites, over all sweeps
KL_TOKENS = 8192
MEASUREMENTS = 12
# change of a group's sparsity: at first, at most, and where an exchange is over
FIRST_STEP, LARGEST_STEP, LAST_STEP = 0.06, 0.15, 0.01
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
    """The search for one overall sparsity. ``cost``: of ``shares``, see `_cost`."""

    task: Task
    target: float
    price: float
    shares: list[float]
    cost: float = math.inf
    left: int = 0
    groups: list[_Group] = field(default_factory=list)

    @classmethod
    def start(cls, task: Task, target: float, curves: list[Curve]) -> _Exchange:
        """From the best of the curves. The price of sparsity is its slope there."""
        search = cls(task, target, 0.0, [])
        kl, sparsity = search._measure(curves[0].at(target))
        less_kl, less = search._measure(curves[0].at(max(target - PRICE_STEP, target / 2)))
        search.price = max(math.log(kl / less_kl) / max(sparsity - less, 1e-6), 0.0)
        for curve in curves:
            shares = curve.at(target)
            cost = search._cost(shares)
            if cost < search.cost:
                search.cost, search.shares = cost, shares
        search.groups = _groups(task)
        search.left = MEASUREMENTS * len(units(task.gated))
        return search

    def run(self) -> list[float]:
        """Sweep over the groups until no step is worth trying or the measurements are used up."""
        while self.left > 0 and any(group.step >= LAST_STEP for group in self.groups):
            for group in self.groups:
                if self.left > 0 and group.step >= LAST_STEP:
                    self._try(group)
        return self.shares

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
        """The chosen sites changed, and all shifted alike until the weighted mean is right."""
        moved = [s + change if i in chosen else s for i, s in enumerate(self.shares)]
        moved = [min(max(s, 0.0), HIGHEST) for s in moved]
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
