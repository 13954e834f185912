"""What a method is given and what it returns: the linears of one site, and their solutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from prune_llm.masks import Pattern, Scope
from prune_llm.statistics import InputStatistics, Needs


@dataclass(frozen=True)
class Problem:
    """The linears that share one input, to be pruned together.

    Attributes:
        weights_OI: float32 weights [O, I] of each linear; finite; not to be changed in place.
        patterns: what each linear must satisfy, in the same order.
        statistics: of the shared input; None for a method that needs nothing.
        damping: fraction of the mean diagonal of the Gram matrix added to its diagonal.
        column_block: columns that SparseGPT updates together.
        seed: of the site, for a method that draws at random.
    """

    weights_OI: tuple[Tensor, ...]
    patterns: tuple[Pattern, ...]
    statistics: InputStatistics | None
    damping: float
    column_block: int
    seed: int = 0

    def input_statistics(self) -> InputStatistics:
        assert self.statistics is not None, "a method that needs statistics was given none"
        return self.statistics


@dataclass(frozen=True)
class Solution:
    """One pruned linear.

    Attributes:
        weight_OI: float32 [O, I]; exactly +0.0 wherever ``keep_OI`` is False.
        keep_OI: bool [O, I]; True = survives.
        notes: what the report must say about it, such as a damping that had to be raised.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """One pruning algorithm: a module-level object per file, listed in ``METHODS``."""

    @property
    def needs(self) -> Needs: ...

    @property
    def scope(self) -> Scope | None:
        """What an unstructured pattern compares; None: the method has its own rule."""

    def solve(self, problem: Problem) -> list[Solution]: ...


@runtime_checkable
class SolvesTogether(Method, Protocol):
    """A method that can take sites of one shape at once."""

    def solve_together(self, problems: Sequence[Problem]) -> list[list[Solution]]: ...
