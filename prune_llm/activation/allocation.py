"""Allocations: how an overall sparsity is spread over the sites."""

from __future__ import annotations

from collections.abc import Callable

from prune_llm.activation.balance import balance
from prune_llm.activation.curve import Curve, Task
from prune_llm.activation.greedy import greedy


def uniform(task: Task) -> Curve:
    """The same sparsity for every site."""
    return Curve.through(len(task.gated.sites), [])


ALLOCATIONS: dict[str, Callable[[Task], Curve]] = {
    "uniform": uniform,
    "greedy": greedy,
    "global": balance,
}
