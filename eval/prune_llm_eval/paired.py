"""Differences between two models that were scored on the same documents, and how sure they are.

Both models see the same documents, so what one document adds to both cancels: the standard error of
the paired difference is smaller than that of two separate means.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean, stdev
from typing import Any

# of the values of documents, such as weighted_perplexity; fmean for a mean, whose error is exact
Aggregate = Callable[[Sequence[Any]], float]
# groups of documents that are left out in turn; with fewer documents, each of them
GROUPS = 200
# standard errors for 95 % of a normal distribution
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Paired:
    """A model's value minus the first model's, on one metric.

    Attributes:
        stderr: of the difference; nan where it is not known.
        changed: documents whose own value differs; None where documents have no value of their own.
        better: those of them where the model does better; None also where no direction is known.
    """

    difference: float
    stderr: float
    changed: int | None = None
    better: int | None = None

    @property
    def significant(self) -> bool | None:
        """Further from 0 than 1.96 standard errors; None where that cannot be told."""
        if self.difference == 0 and self.stderr == 0:
            return False
        if not self.stderr > 0:  # nan, or 0: one document, or all differ alike
            return None
        return abs(self.difference) > NORMAL_95 * self.stderr


def compare_pairs(
    first: Sequence[Any],
    second: Sequence[Any],
    aggregate: Aggregate,
    higher_is_better: bool | None,
) -> Paired:
    """``second`` minus ``first``: the values of the same documents in the same order."""
    difference = aggregate(second) - aggregate(first)

    if aggregate is fmean:
        stderr = mean_stderr([b - a for a, b in zip(first, second, strict=True)])
    else:
        stderr = jackknife(
            lambda kept: aggregate([second[i] for i in kept]) - aggregate([first[i] for i in kept]),
            len(first),
        )
    pairs = [(_number(a), _number(b)) for a, b in zip(first, second, strict=True)]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < len(pairs):
        return Paired(difference, stderr)
    changed = sum(a != b for a, b in known)
    if higher_is_better is None:
        return Paired(difference, stderr, changed)
    better = sum((b > a) if higher_is_better else (b < a) for a, b in known)
    return Paired(difference, stderr, changed, better)


def mean_stderr(values: Sequence[float]) -> float:
    """Standard error of a mean; nan for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def jackknife(statistic: Callable[[Sequence[int]], float], documents: int) -> float:
    """Standard error of a statistic of documents 0 to n - 1, by leaving out one group at a time.

    With up to GROUPS documents each is a group, and for a mean this is its textbook standard error.
    More are put into groups at random, with a fixed seed: their order may mean something. nan for
    fewer than two documents, or where the statistic is not defined without a group.
    """
    groups = min(documents, GROUPS)
    if groups < 2:
        return math.nan
    order = list(range(documents))
    random.Random(0).shuffle(order)
    group_of = {document: place % groups for place, document in enumerate(order)}
    try:
        left_out = [
            statistic([i for i in range(documents) if group_of[i] != group])
            for group in range(groups)
        ]
    except (ZeroDivisionError, ValueError, OverflowError):
        return math.nan
    mean = math.fsum(left_out) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((x - mean) ** 2 for x in left_out))


def combine(parts: Sequence[Paired], weights: Sequence[float]) -> Paired:
    """Of a weighted mean of tasks that share no documents."""
    total = math.fsum(weights)
    difference = math.fsum(w * p.difference for w, p in zip(weights, parts, strict=True)) / total
    squares = math.fsum((w * p.stderr) ** 2 for w, p in zip(weights, parts, strict=True))
    changed = [p.changed for p in parts if p.changed is not None]
    better = [p.better for p in parts if p.better is not None]
    return Paired(
        difference,
        math.sqrt(squares) / total,
        sum(changed) if len(changed) == len(parts) else None,
        sum(better) if len(better) == len(parts) else None,
    )


def _number(value: Any) -> float | None:
    """What a document's value is on its own: a number, or nats per unit of (loglikelihood, units).

    None for anything else, such as pairs of texts that only a whole corpus gives a value.
    """
    if isinstance(value, Real):  # numpy's numbers too
        return float(value)
    if isinstance(value, tuple | list) and len(value) == 2:
        loglikelihood, units = value
        if isinstance(loglikelihood, Real) and isinstance(units, Real) and units:
            return -float(loglikelihood) / float(units)
    return None
