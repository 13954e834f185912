"""Sparsity patterns and the exact-count keep-masks that satisfy them. Pure tensor code.

Shape letters: O = output features, I = input features, R = rows, W = width of a row.

Selection is by rank, never by comparing with a threshold, so ties cannot change a count.
Tie rule: of equal scores the one with the lower index (further left, then further up) is
pruned first.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prune_llm_kernels.selection import mark_lowest, supports_mark_lowest

Scope = Literal["row", "matrix"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights may survive: a fraction of all, or N *kept* of every M consecutive inputs.

    N:M has the papers' and NVIDIA's meaning (weights kept); the SparseGPT and Wanda code bases
    count the weights pruned. ``n`` and ``m`` are both set or both None.
    """

    sparsity: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "0.5" (sparsity) or "2:4" (kept:group). Raises ValueError for anything else."""
        kept, colon, group = text.partition(":")
        if not colon:
            return cls(sparsity=_parse_sparsity(text))
        try:
            n, m = int(kept), int(group)
        except ValueError:
            raise ValueError(_pattern_error(text, "N and M must be whole numbers")) from None
        if not 0 < n < m:
            raise ValueError(
                _pattern_error(text, "N weights are kept of every M, so 0 < N < M must hold")
            )
        return cls(sparsity=1 - n / m, n=n, m=m)

    def __str__(self) -> str:
        if self.m is not None:
            return f"{self.n}:{self.m}"
        short = f"{self.sparsity:g}"  # an allocation's sparsities need all their digits
        return short if float(short) == self.sparsity else repr(self.sparsity)


def _pattern_error(text: str, rule: str) -> str:
    return f"pattern {text!r}: {rule}; write for example 0.5 (half pruned) or 2:4 (2 kept of 4)"


def _parse_sparsity(text: str) -> float:
    try:
        sparsity = float(text)
    except ValueError:
        raise ValueError(
            _pattern_error(text, "neither a sparsity nor N:M (N weights kept of every M)")
        ) from None
    if not 0 <= sparsity < 1:
        raise ValueError(_pattern_error(text, "sparsity must be in [0, 1)"))
    return sparsity


def pruned_per_row(shape_OI: tuple[int, int], pattern: Pattern) -> list[int]:
    """How many weights each of the O rows loses.

    Unstructured: round(O * I * sparsity) in all, spread so that rows differ by at most one.
    N:M: each full group of M loses M - N; a last group of t < M inputs keeps ceil(N * t / M),
    so that it never holds more than its share and is never emptied.
    """
    rows, width = shape_OI
    if pattern.m is None or pattern.n is None:
        return spread(round(rows * width * pattern.sparsity), rows)
    groups, tail = divmod(width, pattern.m)
    return [groups * (pattern.m - pattern.n) + tail - tail_kept(tail, pattern)] * rows


def tail_kept(tail: int, pattern: Pattern) -> int:
    """Weights kept in a last group of ``tail`` < M inputs: ceil(N * tail / M)."""
    assert pattern.n is not None and pattern.m is not None
    return -(-pattern.n * tail // pattern.m)


def spread(total: int, parts: int) -> list[int]:
    """Cut ``total`` into ``parts`` whole numbers that differ by at most one and add up exactly."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def keep_mask(scores_OI: Tensor, pattern: Pattern, scope: Scope = "row") -> Tensor:
    """Keep the highest scores, exactly as many as `pattern` allows.

    Args:
        scores_OI: importance of each weight, larger is more important; no NaN.
        pattern: unstructured or N:M (groups of M consecutive inputs of one row).
        scope: what an unstructured pattern compares: weights of one output row (Wanda) or of the
            whole matrix (magnitude). N:M always compares inside its groups.

    Returns:
        bool [O, I]; True where the weight survives.
    """
    if pattern.m is not None:
        return ~_lowest_of_groups(scores_OI, pattern)
    if scope == "matrix":
        count = round(scores_OI.numel() * pattern.sparsity)
        return ~lowest(scores_OI.reshape(1, -1), count).reshape(scores_OI.shape)
    pruned = torch.tensor(pruned_per_row((scores_OI.shape[0], scores_OI.shape[1]), pattern))
    if supports_mark_lowest(scores_OI):
        return mark_lowest(scores_OI, pruned).logical_not_()
    keep_OI = torch.ones_like(scores_OI, dtype=torch.bool)
    for count in pruned.unique().tolist():  # at most two different counts
        rows = (pruned == count).nonzero().flatten().to(scores_OI.device)
        keep_OI[rows] = ~lowest(scores_OI[rows], count)
    return keep_OI


def lowest(scores_RW: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest scores of each row; of equal ones the leftmost. bool [R, W]."""
    if count == 0 or scores_RW.numel() == 0:
        return torch.zeros_like(scores_RW, dtype=torch.bool)
    border_R1 = _kth_lowest(scores_RW, count)
    marked_RW = scores_RW <= border_R1
    if int(torch.count_nonzero(marked_RW)) == count * len(scores_RW):
        return marked_RW  # no row has more ties at its border than places left
    marked_RW = scores_RW < border_R1
    ties_RW = scores_RW == border_R1
    missing_R = count - marked_RW.sum(dim=1)
    crowded_R = ties_RW.sum(dim=1) > missing_R
    marked_RW[~crowded_R] |= ties_RW[~crowded_R]
    if crowded_R.any():  # more ties than places left: only the leftmost
        order_RW = ties_RW[crowded_R].cumsum(dim=1, dtype=torch.int32)
        marked_RW[crowded_R] |= ties_RW[crowded_R] & (order_RW <= missing_R[crowded_R, None])
    return marked_RW


def _kth_lowest(scores_RW: Tensor, count: int) -> Tensor:
    """The ``count``-th lowest score of each row [R, 1]."""
    if scores_RW.device.type != "cpu":
        return scores_RW.kthvalue(count, dim=1, keepdim=True).values
    # numpy's partition takes half the time of torch's kthvalue, and lets other threads run
    parts = [part.numpy() for part in scores_RW.chunk(torch.get_num_threads())]
    with ThreadPoolExecutor(len(parts)) as pool:
        borders = list(pool.map(lambda part: _kth_column(part, count), parts))
    return torch.from_numpy(np.concatenate(borders))


def _kth_column(scores_RW: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    return np.partition(scores_RW, count - 1, axis=1)[:, count - 1 : count].copy()


def _lowest_of_groups(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mark what N:M prunes, tail group included (see `pruned_per_row`). bool [O, I]."""
    assert pattern.n is not None and pattern.m is not None
    rows, width = scores_OI.shape
    full = width - width % pattern.m
    groups = scores_OI[:, :full].reshape(-1, pattern.m)
    marked = lowest_small(groups, pattern.m - pattern.n).reshape(rows, full)
    if full == width:
        return marked
    tail = width - full
    tail_marked = lowest_small(scores_OI[:, full:], tail - tail_kept(tail, pattern))
    return torch.cat([marked, tail_marked], dim=1)


def lowest_small(scores_RW: Tensor, count: int) -> Tensor:
    """`lowest` for narrow rows, by a stable sort: many rows of a few scores each. bool [R, W]."""
    order = scores_RW.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores_RW, dtype=torch.bool).scatter_(1, order, True)


def zero_pruned(weight_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """The weight, float32 [O, I], with +0.0 wherever ``keep_OI`` is False.

    By its bits: torch's masked_fill takes five times as long on a CPU.
    """
    assert weight_OI.dtype == torch.float32
    bits_OI = keep_OI.to(torch.int32).neg_()  # all ones where a weight survives
    return bits_OI.bitwise_and_(weight_OI.view(torch.int32)).view(torch.float32)


def check_keep_mask(keep_OI: Tensor, pattern: Pattern, scope: Scope = "row") -> str | None:
    """Say what is wrong with a keep-mask, or None when its counts satisfy `pattern` exactly."""
    rows, width = keep_OI.shape
    pruned_R = pruned_per_row((rows, width), pattern)
    total = keep_OI.numel() - int(torch.count_nonzero(keep_OI))
    if total != sum(pruned_R):
        return f"{total} weights pruned, {sum(pruned_R)} requested"
    if pattern.m is not None and pattern.n is not None:
        return _check_groups(keep_OI, pattern)
    kept_O = keep_OI.view(torch.uint8).sum(dim=1, dtype=torch.int32)
    if scope == "row" and (width - kept_O).tolist() != pruned_R:
        return "the rows do not lose equally many weights"
    return None


def _check_groups(keep_OI: Tensor, pattern: Pattern) -> str | None:
    assert pattern.n is not None and pattern.m is not None
    width = keep_OI.shape[1]
    full = width - width % pattern.m
    kept = keep_OI[:, :full].reshape(-1, pattern.m).sum(dim=1)
    if full and not bool((kept == pattern.n).all()):
        return f"a group of {pattern.m} inputs does not keep {pattern.n} weights"
    tail = width - full
    if tail and not bool((keep_OI[:, full:].sum(dim=1) == tail_kept(tail, pattern)).all()):
        return f"the last group of {tail} inputs does not keep {tail_kept(tail, pattern)} weights"
    return None
