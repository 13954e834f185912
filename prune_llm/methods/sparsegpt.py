"""SparseGPT (Frantar and Alistarh 2023, "Massive Language Models Can Be Accurately Pruned in
One-Shot", arXiv 2301.00774, algorithm 1).

Columns are pruned from left to right; what pruning column i breaks is repaired in the columns to
its right along the rows of U, the upper Cholesky factor of the inverse Hessian (H^-1 = U^T U).

The symbols are the paper's: W weights, H = X X^T + damping, E the errors of a column block. All
matrices are held transposed, [I, O], so that a column of W is contiguous. Linears that share an
input share H, so their rows are stacked and solved in one sweep; only the choice of the mask looks
at each linear alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_llm.masks import Pattern, Scope, lowest, lowest_small, tail_kept
from prune_llm.methods.problem import Problem, Solution
from prune_llm.statistics import Needs

MAX_DAMPING = 10.0


class SparseGPT:
    """Mask and update of algorithm 1; an unstructured mask is chosen per rows x column block."""

    needs = Needs.GRAM
    scope: Scope | None = None

    def solve(self, problem: Problem) -> list[Solution]:
        gram_II = problem.input_statistics().gram_II
        factor = inverse_factor(gram_II, problem.damping)
        solutions: list[Solution | None] = [None] * len(problem.weights_OI)
        for pattern in dict.fromkeys(problem.patterns):
            members = [i for i, other in enumerate(problem.patterns) if other == pattern]
            weights = [problem.weights_OI[i] for i in members]
            solved = _sweep(weights, factor, pattern, problem.column_block)
            for i, (weight_OI, keep_OI) in zip(members, solved, strict=True):
                solutions[i] = Solution(weight_OI, keep_OI, factor.notes)
        return [solution for solution in solutions if solution is not None]


@dataclass(frozen=True)
class InverseFactor:
    """U with U^T U = (H + damping)^-1, float32 upper triangular [I, I].

    dead_I marks inputs that were zero on every token: their weights are pruned before all others.
    """

    upper_II: Tensor
    dead_I: Tensor
    damping: float
    notes: tuple[str, ...]


def inverse_factor(gram_II: Tensor, damping: float) -> InverseFactor:
    """Factorise the damped inverse; on failure retry in float64, then with ten times the damping.

    Raises:
        ValueError: no damping up to 10 times the mean diagonal makes H positive definite (it is
            then not a Gram matrix: non-finite or not symmetric).
    """
    diagonal = gram_II.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the Gram matrix is not finite: the calibration activations overflowed")
    dead_I = diagonal == 0
    scale = float(diagonal[~dead_I].mean()) if not bool(dead_I.all()) else 1.0
    level, dtype = damping, torch.float32
    while level <= MAX_DAMPING:
        upper_II = _factorise(gram_II, level * scale, dead_I * scale, dtype)
        if upper_II is not None:
            return InverseFactor(upper_II, dead_I, level, _notes(damping, level, dtype))
        if dtype == torch.float64:
            level = max(level, 1e-4) * 10
        dtype = torch.float64
    raise ValueError(
        f"the Gram matrix could not be factorised with damping {damping:g} to {MAX_DAMPING:g} "
        "of its mean diagonal, not even in float64; check the calibration data for huge values"
    )


def _notes(asked: float, used: float, dtype: torch.dtype) -> tuple[str, ...]:
    if dtype == torch.float32:
        return ()
    raised = "" if used == asked else f" with damping raised from {asked:g} to {used:g}"
    return (f"Cholesky failed in float32, solved in float64{raised}",)


def _factorise(
    gram_II: Tensor, damping: float, dead_I: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """U = R^-1 where H = R R^T with R upper triangular; None when H is not positive definite.

    R is the Cholesky factor of H with rows and columns reversed. (R R^T)^-1 = R^-T R^-1, so R^-1
    is the factor the paper obtains as chol(H^-1, upper), without ever forming H^-1: half the work.
    """
    hessian_II = gram_II.flip(0, 1).to(dtype)
    hessian_II.diagonal().add_(dead_I.flip(0).to(dtype)).add_(damping)
    lower_II, info = torch.linalg.cholesky_ex(hessian_II)
    if int(info) != 0:
        return None
    del hessian_II
    upper_II = lower_II.flip(0, 1)
    del lower_II
    _invert_upper(upper_II)
    return upper_II.float() if bool(torch.isfinite(upper_II).all()) else None


# below this a triangular solve is quicker than two products of half the size
INVERT_LEAF = 256


def _invert_upper(matrix: Tensor) -> None:
    """Invert an upper triangular matrix in place, by halves.

    [A B; 0 D]^-1 = [A^-1  -A^-1 B D^-1; 0 D^-1]: matrix products only, a third of the work of
    solving against the identity.
    """
    size = len(matrix)
    if size <= INVERT_LEAF:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    _invert_upper(matrix[:half, :half])
    _invert_upper(matrix[half:, half:])
    corner = matrix[:half, :half] @ matrix[:half, half:]
    torch.mm(corner, matrix[half:, half:], out=matrix[:half, half:]).neg_()


def _sweep(
    weights_OI: list[Tensor], factor: InverseFactor, pattern: Pattern, column_block: int
) -> list[tuple[Tensor, Tensor]]:
    """Prune all columns, one lazy column block after the other. Returns (weight, keep) pairs."""
    rows = [weight.shape[0] for weight in weights_OI]
    weight_IO = torch.cat([weight.T for weight in weights_OI], dim=1).contiguous()
    keep_IO = torch.empty_like(weight_IO, dtype=torch.bool)
    width = weight_IO.shape[0]
    step = _block_columns(column_block, pattern)
    for start in range(0, width, step):
        end = min(start + step, width)
        block = _Block(weight_IO, factor, rows, start, end)
        keep_IO[start:end] = block.prune(pattern)
        weight_IO[end:].addmm_(factor.upper_II[start:end, end:].T, block.error_BO, alpha=-1)
    return [
        (weight.T.contiguous(), keep.T.contiguous())
        for weight, keep in zip(weight_IO.split(rows, 1), keep_IO.split(rows, 1), strict=True)
    ]


def _block_columns(column_block: int, pattern: Pattern) -> int:
    """A column block holds whole groups of M."""
    m = pattern.m or 1
    return -(-column_block // m) * m


# columns whose outstanding errors are taken in by one matrix product
COLUMN_STRIP = 16


class _Block:
    """One column block W1 with its part U1 of the factor; B = columns in it.

    Inside the block errors are taken in when a column is reached (E[:i] times U1[:i, i]), not when
    they arise: the same sums as the paper's, with reads instead of writes, and a strip of columns
    at a time by one matrix product.
    """

    def __init__(
        self, weight_IO: Tensor, factor: InverseFactor, rows: list[int], start: int, end: int
    ) -> None:
        self.weight_BO = weight_IO[start:end]  # a view: solved columns are written in place
        self.upper_BB = factor.upper_II[start:end, start:end].contiguous()
        self.scale_B1 = self.upper_BB.diagonal()[:, None]
        self.dead_B = factor.dead_I[start:end]
        self.error_BO = torch.zeros_like(self.weight_BO)
        self.rows, self.start, self.end, self.width = rows, start, end, weight_IO.shape[0]

    def prune(self, pattern: Pattern) -> Tensor:
        """Returns keep [B, O]; weights of the block and `error_BO` are final afterwards."""
        columns = self.end - self.start
        whole_BO = self._keep_unstructured(pattern) if pattern.m is None else None
        step = pattern.m or COLUMN_STRIP
        strips = []
        for first in range(0, columns, step):
            last = min(first + step, columns)
            updated = self._updated(first, last)
            if whole_BO is not None:
                keep = whole_BO[first:last]
            else:
                keep = self._keep_group(first, last, updated, pattern)
            self._columns(first, updated, keep)
            strips.append(keep)
        return torch.cat(strips)

    def _scores(self, first: int, last: int, weight_BO: Tensor) -> Tensor:
        """w^2 / [U_ii]^2, the error that pruning w causes (eq. 4); inputs never seen come last."""
        scores_BO = (weight_BO / self.scale_B1[first:last]).square_()
        return scores_BO.masked_fill_(self.dead_B[first:last, None], -1.0)

    def _keep_unstructured(self, pattern: Pattern) -> Tensor:
        """The mask of the whole block, chosen before its first column is solved. bool [B, O]."""
        scores_BO = self._scores(0, self.end - self.start, self.weight_BO)
        parts = []
        for scores in scores_BO.split(self.rows, dim=1):
            total = round(scores.shape[1] * self.width * pattern.sparsity)
            # cumulative rounding: the blocks add up to the linear's exact count
            count = total * self.end // self.width - total * self.start // self.width
            marked = lowest(scores.T.reshape(1, -1), count).reshape(scores.shape[1], -1)
            parts.append(~marked.T)
        return torch.cat(parts, dim=1)

    def _keep_group(self, first: int, last: int, updated: Tensor, pattern: Pattern) -> Tensor:
        """N:M: chosen from the weights as updated so far. bool [last - first, O]."""
        assert pattern.n is not None and pattern.m is not None
        size = last - first
        kept = pattern.n if size == pattern.m else tail_kept(size, pattern)
        return ~lowest_small(self._scores(first, last, updated).T, size - kept).T

    def _updated(self, first: int, last: int) -> Tensor:
        """Columns first:last with the errors of all columns before ``first`` taken in."""
        weight = self.weight_BO[first:last]
        if first == 0:
            return weight.clone()
        return torch.addmm(
            weight, self.upper_BB[:first, first:last].T, self.error_BO[:first], alpha=-1
        )

    def _columns(self, first: int, updated: Tensor, keep: Tensor) -> None:
        """Solve a strip of columns one by one; only errors of the strip itself are outstanding."""
        for i, (w_O, keep_O) in enumerate(zip(updated, keep, strict=True), first):
            if i > first:
                w_O = torch.addmv(
                    w_O, self.error_BO[first:i].T, self.upper_BB[first:i, i], alpha=-1
                )
            torch.div(w_O, self.upper_BB[i, i], out=self.error_BO[i]).masked_fill_(keep_O, 0.0)
            self.weight_BO[i] = w_O.masked_fill(~keep_O, 0.0)
