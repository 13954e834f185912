"""Aim a linear at the dense model's output before it is pruned.

A pruned model feeds a linear X^, the dense model X~. The dense weights on X^ repeat what earlier
blocks broke; the weights here undo as much of it as a linear can:

    W~ = argmin ||W X~ + R~ - R^ - W~ X^||_F^2 + l ||W~ - W||_F^2
       = W + (W D + S) (H + l I)^-1
    H = X^ X^ ^T,  C = X~ X^ ^T,  D = C - H,  S = (R~ - R^) X^ ^T

These are the normal equations W~ (H + l I) = W (C + l I) + S. R is what the linear's output is
added to, the residual stream: attention and MLP write to it, so their last linears can also undo
the error that it carries. For all others S = 0, and the correction is that of "Quantization Error
Propagation" (Arai and Ichikawa 2025, arXiv 2504.09629), whose alpha is ``strength`` here: to go
only part of the way is better. The ridge pulls towards W and not towards zero, so that equal inputs
change nothing, however large l is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prune_llm.statistics import InputStatistics, all_finite

MAX_DAMPING = 10.0
# token perplexity of the reference model after SparseGPT, 0.75 and 1: 9.01 and 9.39 at 50 %, 12.4
# and 12.9 at 2:4, 16.2 and 16.4 at 60 %
STRENGTH = 0.75


def aimed_at_dense(
    weights_OI: tuple[Tensor, ...],
    statistics: InputStatistics,
    damping: float,
    strength: float = STRENGTH,
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """W~ of each linear of a site, float32 [O, I], and notes for the report.

    Args:
        weights_OI: the dense weights W, float32.
        damping: l as a fraction of the mean diagonal of H; raised, with a note, where H + l I is
            not positive definite.
        strength: share of the way from W to W~.

    Raises:
        ValueError: the statistics are not finite, or no damping up to 10 makes H definite.
    """
    difference_II, shift_DI = statistics.difference_II, statistics.shift_DI
    sums = [difference_II] if shift_DI is None else [difference_II, shift_DI]
    if not all(all_finite(values) for values in sums):
        raise ValueError("the dense model's calibration activations overflowed; try float32")
    if not any(bool(values.any()) for values in sums):
        return weights_OI, ()
    lower_II, used = _factor(statistics.gram_II, damping)
    aimed = []
    for weight_OI in weights_OI:
        right_OI = weight_OI @ difference_II
        if shift_DI is not None:
            right_OI += shift_DI
        change_IO = torch.cholesky_solve(right_OI.T.double(), lower_II)
        aimed.append((weight_OI + strength * change_IO.T).float())
    raised = f"dense target solved with damping raised from {damping:g} to {used:g}"
    return tuple(aimed), () if used == damping else (raised,)


def _factor(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of H + l I in float64, and the damping that made it possible."""
    diagonal_I = gram_II.diagonal()
    dead_I = (diagonal_I == 0).double()
    scale = float(diagonal_I[diagonal_I > 0].double().mean())
    level = damping
    while level <= MAX_DAMPING:
        hessian_II = gram_II.double()
        # an input that is always zero has no equation of its own
        hessian_II.diagonal().add_(level * scale + dead_I * scale)
        lower_II, info = torch.linalg.cholesky_ex(hessian_II)
        if int(info) == 0:
            return lower_II, level
        level = max(level, 1e-4) * 10
    raise ValueError(
        f"the Gram matrix could not be factorised with damping {damping:g} to {MAX_DAMPING:g} "
        "of its mean diagonal; check the calibration data for huge values"
    )
