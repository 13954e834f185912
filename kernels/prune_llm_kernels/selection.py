"""Exact selection by rank on the CPU. Shape letters: R = rows, W = scores in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_llm_kernels.tokens import supports_rows


def supports_mark_lowest(scores_RW: Tensor) -> bool:
    """Whether `mark_lowest` takes these scores: float32 on a CPU where the extension is built."""
    return scores_RW.dtype == torch.float32 and supports_rows(scores_RW)


def mark_lowest(scores_RW: Tensor, counts_R: Tensor) -> Tensor:
    """Mark the ``counts`` lowest scores of each row; of equal ones the leftmost. bool [R, W].

    Args:
        scores_RW: float32, no NaN.
        counts_R: int64, each between 0 and W.

    Raises:
        ValueError: shapes or counts that do not fit.
    """
    from prune_llm_kernels import _C

    R, W = scores_RW.shape
    if counts_R.shape != (R,) or counts_R.dtype != torch.int64:
        raise ValueError(
            f"counts is {counts_R.dtype} of shape {list(counts_R.shape)}; it must be torch.int64 "
            f"[{R}]"
        )
    if R and (int(counts_R.min()) < 0 or int(counts_R.max()) > W):
        raise ValueError(f"counts must lie between 0 and the {W} scores of a row")
    scores_RW, counts_R = scores_RW.contiguous(), counts_R.contiguous()
    marked_RW = torch.empty(R, W, dtype=torch.bool)
    if marked_RW.numel():
        _C.mark_lowest(
            torch.get_num_threads(),
            scores_RW.data_ptr(),
            R,
            W,
            counts_R.data_ptr(),
            marked_RW.data_ptr(),
        )
    return marked_RW
