"""Every op in plain PyTorch: the specification that the other backends are compared with.

The stored form of a weight [O, I] (FORMAT.md): ``bitmask`` uint8 [O, ceil(I/8)], least significant
bit first; ``packed``, the kept values in row-major order, [nnz], or [O, K] where every row keeps
the same number (N:M patterns); ``offsets`` int32 or int64 [O + 1] for the first kind, else None.

Shape letters: O = output features, I = input features, K = kept per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels.packed_weight import PackedWeight

if TYPE_CHECKING:
    from prune_llm_kernels.plan import Plan

_BITS = [1, 2, 4, 8, 16, 32, 64, 128]


def keep_mask(bitmask: Tensor, in_features: int) -> Tensor:
    """Bitmask uint8 [O, ceil(I/8)] -> bool [O, I], True where the weight is kept."""
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=bitmask.device)
    keep = (bitmask.unsqueeze(-1) & bits) != 0
    return keep.flatten(1)[:, :in_features]


def pack(weight_OI: Tensor, *, fixed_count: bool = False) -> PackedWeight:
    """Keep the nonzero weights.

    Args:
        weight_OI: bfloat16, float16 or float32.
        fixed_count: store [O, K] without offsets; every row must keep the same number.
    """
    O, I = weight_OI.shape
    keep = weight_OI != 0
    counts = keep.sum(1)
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=keep.device)
    bytes_ = F.pad(keep, (0, -I % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    bitmask = (bytes_ * bits).sum(-1, dtype=torch.uint8)
    values = weight_OI[keep]
    if fixed_count:
        kept = int(counts[0]) if O else 0
        if bool((counts != kept).any()):
            raise ValueError("fixed_count needs the same number of nonzero weights in every row")
        return PackedWeight(bitmask, values.reshape(O, kept), None, I)
    wide = torch.int64 if O * I >= 2**31 else torch.int32
    offsets = F.pad(counts.cumsum(0), (1, 0)).to(wide)
    return PackedWeight(bitmask, values, offsets, I)


def check_contents(bitmask: Tensor, packed: Tensor, offsets: Tensor | None, columns: int) -> None:
    """Raise ValueError unless bitmask and offsets agree; reads every mask byte and offset."""
    O, B = bitmask.shape
    if offsets is None:
        starts = torch.arange(O + 1, device=bitmask.device) * (packed.shape[1] if O else 0)
    else:
        starts = offsets.to(torch.int64)
        if starts[0] != 0:
            raise ValueError(f"offsets[0] is {int(starts[0])}; it must be 0")
        bad = ((starts.diff() < 0) | (starts[1:] > packed.numel())).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"offsets[{row + 1}] is {int(starts[row + 1])}; it must lie between offsets[{row}]"
                f" = {int(starts[row])} and the {packed.numel()} values of packed"
            )
        if starts[-1] != packed.numel():
            raise ValueError(
                f"offsets[{O}] is {int(starts[-1])}; it must be the {packed.numel()} values of"
                " packed"
            )
    bits = keep_mask(bitmask, 8 * B)
    padded, kept, expected = bits[:, columns:].any(1), bits.sum(1), starts.diff()
    for row in (padded | (kept != expected)).nonzero().flatten().tolist():
        if padded[row]:
            raise ValueError(f"bitmask row {row} has a padding bit set behind column {columns - 1}")
        raise ValueError(
            f"bitmask row {row} keeps {int(kept[row])} weights; packed has {int(expected[row])}"
            " for it"
        )


def settle(tensor: Tensor) -> None:
    """Nothing to do: where a tensor lies does not change a result."""


def unpack(bitmask: Tensor, packed: Tensor, offsets: Tensor | None, columns: int) -> Tensor:
    """Stored form -> dense weight [O, I]; exact."""
    keep = keep_mask(bitmask, columns)
    dense = torch.zeros(keep.shape, dtype=packed.dtype, device=packed.device)
    return dense.masked_scatter_(keep, packed.reshape(-1))


def sparse_linear(
    x: Tensor, bitmask: Tensor, packed: Tensor, offsets: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y = x W^T + bias; x [..., I] -> y [..., O]."""
    return F.linear(x, unpack(bitmask, packed, offsets, x.shape[-1]), bias)


def dense_linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias; x [..., I] -> y [..., O]."""
    return F.linear(x, weight_OI, bias)


def new_plan(dtype: torch.dtype) -> Plan:
    """An empty plan; see plan.py."""
    from prune_llm_kernels.reference_plan import ReferencePlan

    return ReferencePlan(dtype)
