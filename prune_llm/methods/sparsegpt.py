"""SparseGPT (Frantar and Alistarh 2023, "Massive Language Models Can Be Accurately Pruned in
One-Shot", arXiv 2301.00774, algorithm 1).

Columns are pruned from left to right; what pruning column i breaks is repaired in the columns to
its right along the rows of U, the upper Cholesky factor of the inverse Hessian (H^-1 = U^T U).

The symbols are the paper's: W weights, H = X X^T + damping, E the errors of a column block. All
matrices are held transposed, [I, O], so that a column of W is contiguous. Linears that share an
input share H, so their rows are stacked and solved in one sweep; only the choice of the mask looks
at each linear alone.

Sites of one shape, as a block's experts are, can be solved together: every matrix then has a
dimension for the sites in front. A GPU has too little to do for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def solve_together(self, problems: Sequence[Problem]) -> list[list[Solution]]:
        """As `solve`, of sites whose linears have the same shapes, patterns and damping."""
        first = problems[0]
        grams = [problem.input_statistics().gram_II for problem in problems]
        factors = inverse_factors(grams, first.damping)
        stacked = InverseFactor(
            torch.stack([factor.upper_II for factor in factors]),
            torch.stack([factor.dead_I for factor in factors]),
            first.damping,
            (),
        )
        found: list[list[Solution | None]] = [[None] * len(first.patterns) for _ in problems]
        for pattern in dict.fromkeys(first.patterns):
            members = [i for i, other in enumerate(first.patterns) if other == pattern]
            weights = [torch.stack([p.weights_OI[i] for p in problems]) for i in members]
            solved = _sweep(weights, stacked, pattern, first.column_block)
            for i, (weight_EOI, keep_EOI) in zip(members, solved, strict=True):
                for e, factor in enumerate(factors):
                    found[e][i] = Solution(weight_EOI[e], keep_EOI[e], factor.notes)
        return [[solution for solution in own if solution is not None] for own in found]


@dataclass(frozen=True)
class InverseFactor:
    """U with U^T U = (H + damping)^-1, float32 upper triangular [I, I]; of many sites [E, I, I].

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
    scale = _scale(diagonal, dead_I)
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


def inverse_factors(grams_II: Sequence[Tensor], damping: float) -> list[InverseFactor]:
    """The same of matrices of one size, factorised together; what fails is done again alone."""
    found = [_first_try(gram_II, damping) for gram_II in grams_II]
    lower_EII, info_E = torch.linalg.cholesky_ex(torch.stack([hessian for hessian, _ in found]))
    upper_EII = lower_EII.flip(1, 2)
    del lower_EII
    _invert_upper(upper_EII)
    good_E = (info_E == 0) & upper_EII.isfinite().all(-1).all(-1)
    return [
        InverseFactor(upper_II, dead_I, damping, ()) if good else inverse_factor(gram_II, damping)
        for good, upper_II, (_, dead_I), gram_II in zip(
            good_E.tolist(), upper_EII, found, grams_II, strict=True
        )
    ]


def _first_try(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What is factorised first, reversed, and the inputs that were zero on every token."""
    dead_I = gram_II.diagonal() == 0
    scale = _scale(gram_II.diagonal(), dead_I)
    return _reversed_hessian(gram_II, damping * scale, dead_I * scale, torch.float32), dead_I


def _scale(diagonal: Tensor, dead_I: Tensor) -> float:
    """What damping is a fraction of."""
    return float(diagonal[~dead_I].mean()) if not bool(dead_I.all()) else 1.0


def _reversed_hessian(
    gram_II: Tensor, damping: float, dead_I: Tensor, dtype: torch.dtype
) -> Tensor:
    hessian_II = gram_II.flip(0, 1).to(dtype)
    hessian_II.diagonal().add_(dead_I.flip(0).to(dtype)).add_(damping)
    return hessian_II


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
    hessian_II = _reversed_hessian(gram_II, damping, dead_I, dtype)
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
    """Invert an upper triangular matrix [..., I, I] in place, by halves.

    [A B; 0 D]^-1 = [A^-1  -A^-1 B D^-1; 0 D^-1]: matrix products only, a third of the work of
    solving against the identity.
    """
    size = matrix.shape[-1]
    if size <= INVERT_LEAF:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    upper, lower = matrix[..., :half, :half], matrix[..., half:, half:]
    _invert_upper(upper)
    _invert_upper(lower)
    corner, place = upper @ matrix[..., :half, half:], matrix[..., :half, half:]
    if matrix.dim() == 2:
        torch.mm(corner, lower, out=place).neg_()
    else:
        place.copy_(corner @ lower).neg_()


def _sweep(
    weights_OI: list[Tensor], factor: InverseFactor, pattern: Pattern, column_block: int
) -> list[tuple[Tensor, Tensor]]:
    """Prune all columns, one lazy column block after the other. Returns (weight, keep) pairs."""
    rows = [weight.shape[-2] for weight in weights_OI]
    weight_IO = torch.cat([weight.mT for weight in weights_OI], dim=-1).contiguous()
    keep_IO = torch.empty_like(weight_IO, dtype=torch.bool)
    width = weight_IO.shape[-2]
    step = _block_columns(column_block, pattern)
    for start in range(0, width, step):
        end = min(start + step, width)
        block = _Block(weight_IO, factor, rows, start, end)
        keep_IO[..., start:end, :] = block.prune(pattern)
        behind_IO, right = weight_IO[..., end:, :], factor.upper_II[..., start:end, end:]
        product = behind_IO.addmm_ if behind_IO.dim() == 2 else behind_IO.baddbmm_
        product(right.mT, block.error_BO, alpha=-1)
    return [
        (weight.mT.contiguous(), keep.mT.contiguous())
        for weight, keep in zip(weight_IO.split(rows, -1), keep_IO.split(rows, -1), strict=True)
    ]


def _less(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """matrix - a b, of one site or of many."""
    product = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    return product(matrix, a, b, alpha=-1)


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
        # a view: solved columns are written in place
        self.weight_BO = weight_IO[..., start:end, :]
        self.upper_BB = factor.upper_II[..., start:end, start:end].contiguous()
        self.scale_B1 = self.upper_BB.diagonal(dim1=-2, dim2=-1)[..., None]
        self.dead_B = factor.dead_I[..., start:end]
        self.error_BO = torch.zeros_like(self.weight_BO)
        self.rows, self.start, self.end, self.width = rows, start, end, weight_IO.shape[-2]

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
                keep = whole_BO[..., first:last, :]
            else:
                keep = self._keep_group(first, last, updated, pattern)
            self._columns(first, updated, keep)
            strips.append(keep)
        return torch.cat(strips, dim=-2)

    def _scores(self, first: int, last: int, weight_BO: Tensor) -> Tensor:
        """w^2 / [U_ii]^2, the error that pruning w causes (eq. 4); inputs never seen come last."""
        scores_BO = (weight_BO / self.scale_B1[..., first:last, :]).square_()
        return scores_BO.masked_fill_(self.dead_B[..., first:last, None], -1.0)

    def _keep_unstructured(self, pattern: Pattern) -> Tensor:
        """The mask of the whole block, chosen before its first column is solved. bool [B, O]."""
        scores_BO = self._scores(0, self.end - self.start, self.weight_BO)
        parts = []
        for scores in scores_BO.split(self.rows, dim=-1):
            columns, rows = scores.shape[-2:]
            total = round(rows * self.width * pattern.sparsity)
            # cumulative rounding: the blocks add up to the linear's exact count
            count = total * self.end // self.width - total * self.start // self.width
            marked = lowest(scores.mT.reshape(-1, rows * columns), count)
            parts.append(~marked.reshape(scores.mT.shape).mT)
        return torch.cat(parts, dim=-1)

    def _keep_group(self, first: int, last: int, updated: Tensor, pattern: Pattern) -> Tensor:
        """N:M: chosen from the weights as updated so far. bool [last - first, O]."""
        assert pattern.n is not None and pattern.m is not None
        size = last - first
        kept = pattern.n if size == pattern.m else tail_kept(size, pattern)
        scores_OM = self._scores(first, last, updated).mT
        marked = lowest_small(scores_OM.reshape(-1, size), size - kept)
        return ~marked.reshape(scores_OM.shape).mT

    def _updated(self, first: int, last: int) -> Tensor:
        """Columns first:last with the errors of all columns before ``first`` taken in."""
        weight = self.weight_BO[..., first:last, :]
        if first == 0:
            return weight.clone()
        return _less(
            weight, self.upper_BB[..., :first, first:last].mT, self.error_BO[..., :first, :]
        )

    def _columns(self, first: int, updated: Tensor, keep: Tensor) -> None:
        """Solve a strip of columns one by one; only errors of the strip itself are outstanding."""
        last = first + updated.shape[-2]
        # views, all at once: taking them one by one costs more than small columns do
        parts = (
            updated, keep, ~keep, self.weight_BO[..., first:last, :],
            self.error_BO[..., first:last, :], self.scale_B1[..., first:last, :],
        )  # fmt: skip
        columns = zip(*(part.unbind(-2) for part in parts), strict=True)
        for i, (w_O, keep_O, drop_O, weight_O, error_O, scale_1) in enumerate(columns, first):
            if i > first:
                w_O = self._taken_in(w_O, first, i)
            torch.div(w_O, scale_1, out=error_O).masked_fill_(keep_O, 0.0)
            weight_O.copy_(w_O.masked_fill(drop_O, 0.0))

    def _taken_in(self, w_O: Tensor, first: int, i: int) -> Tensor:
        """Column i with the errors of the strip's columns before it taken in."""
        errors, upper = self.error_BO[..., first:i, :], self.upper_BB[..., first:i, i]
        if w_O.dim() == 1:
            return torch.addmv(w_O, errors.T, upper, alpha=-1)
        return _less(w_O[..., None], errors.mT, upper[..., None])[..., 0]
