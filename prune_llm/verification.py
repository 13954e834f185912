"""Read a written checkpoint back and hold it to what was promised."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from prune_llm.checkpoint import DTYPES, Checkpoint, StoredTensor
from prune_llm.experts import whole_name
from prune_llm.masks import Pattern, pruned_per_row
from prune_llm.report import LinearResult, count_nonzero
from prune_llm.slices import slice_names
from prune_llm.sparse_checkpoint import SparseCheckpoint, open_stored
from prune_llm.statistics import all_finite


class VerificationError(RuntimeError):
    """The written checkpoint is not what was computed: a bug or a broken disk, not bad input."""


def verify(directory: Path, source: Checkpoint, results: list[LinearResult]) -> dict[str, int]:
    """Check every tensor of a checkpoint of either form against its source and the results.

    Pruned linears: pattern and count, all finite, no -0.0, dtype and shape. All others: the
    source's bytes. Names: exactly the source's. Returns how many of each were checked.

    Raises:
        VerificationError: naming the first tensor that fails.
    """
    written = open_stored(directory)
    names = set(written.names)
    if names != source.tensors.keys():
        different = sorted(names ^ source.tensors.keys())
        raise VerificationError(f"tensor names differ from the source, first {different[0]!r}")
    pruned = {result.tensor: result for result in results}
    fused = {whole_name(name) for name in pruned} - pruned.keys()
    for name, original in source.tensors.items():
        for piece in slice_names(original) if name in fused else [name]:
            if piece in pruned:
                _check_linear(written, source.tensor(piece), pruned[piece])
            else:
                _check_untouched(written, source.tensor(piece))
    return {
        "linears_checked": len(pruned),
        "tensors_identical": len(names - pruned.keys() - fused),
    }


def _check_linear(written: SparseCheckpoint, original: StoredTensor, result: LinearResult) -> None:
    stored = written.read(original.name)
    if (stored.dtype, tuple(stored.shape)) != (DTYPES[original.dtype], original.shape):
        raise VerificationError(f"{original.name}: dtype or shape changed")
    _check_pruned(stored, result)


def _check_untouched(written: SparseCheckpoint, original: StoredTensor) -> None:
    name = original.name
    tensor = written.plain_tensor(name)
    if tensor is None or (tensor.dtype, tensor.shape) != (original.dtype, original.shape):
        raise VerificationError(f"{name}: dtype or shape changed")
    if not _same_bytes(tensor, original):
        raise VerificationError(f"{name}: was to be left alone and its bytes changed")


def _check_pruned(stored: Tensor, result: LinearResult) -> None:
    weight_OI = stored.T if result.transposed else stored
    zero_OI = weight_OI == 0
    if not all_finite(weight_OI):
        raise VerificationError(f"{result.tensor}: holds NaN or infinite weights")
    if count_nonzero(stored) != weight_OI.numel() - int(torch.count_nonzero(zero_OI)):
        raise VerificationError(f"{result.tensor}: holds -0.0")
    if count_nonzero(stored) != result.nonzero:
        raise VerificationError(f"{result.tensor}: its count of non-zero weights changed on disk")
    problem = pattern_violation(zero_OI, Pattern.parse(result.pattern))
    if problem is not None:
        raise VerificationError(f"{result.tensor}: {problem}")


def pattern_violation(zero_OI: Tensor, pattern: Pattern) -> str | None:
    """Say where the zeros of a weight are too few for its pattern; None when they suffice.

    Kept weights may be zero themselves, so a group may hold more zeros than were pruned.
    """
    rows, width = zero_OI.shape
    asked = sum(pruned_per_row((rows, width), pattern))
    zeros = int(torch.count_nonzero(zero_OI))
    if zeros < asked:
        return f"has {zeros} zeros, its pattern {pattern} asks for {asked}"
    if pattern.m is None or pattern.n is None:
        return None
    for group in zero_OI.split(pattern.m, dim=1) if width % pattern.m else [zero_OI]:
        most = (
            pattern.n
            if group.shape[1] >= pattern.m
            else -(-pattern.n * group.shape[1] // pattern.m)
        )
        kept = (~group).reshape(-1, min(pattern.m, group.shape[1])).sum(dim=1)
        if bool((kept > most).any()):
            return f"a group of {pattern.m} inputs keeps more than {most} weights"
    return None


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    return one.nbytes == other.nbytes and all(
        a == b for a, b in zip(one.chunks(), other.chunks(), strict=True)
    )
