"""Every op in plain PyTorch: the specification that the other backends are compared with.

The stored form of a weight [O, I] (FORMAT.md): ``bitmask`` uint8 [O, ceil(I/8)], least significant
bit first; ``packed``, the kept values in row-major order, [nnz], or [O, K] where every row keeps
the same number (N:M patterns); ``offsets`` int32 or int64 [O + 1] for the first kind, else None.

Shape letters: O = output features, I = input features, K = kept per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels.channel_weight import choose_tile as choose_tile
from prune_llm_kernels.packed_weight import PackedWeight

if TYPE_CHECKING:
    from prune_llm_kernels.channel_weight import ChannelWeight
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
    return pack_kept(weight_OI, weight_OI != 0, fixed_count)


def pack_kept(weight_OI: Tensor, keep: Tensor, fixed_count: bool) -> PackedWeight:
    """Keep the weights where ``keep`` [O, I] says so, zeros among them."""
    O, I = weight_OI.shape
    counts = keep.sum(1)
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=keep.device)
    bytes_ = F.pad(keep, (0, -I % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    bitmask = (bytes_ * bits).sum(-1, dtype=torch.uint8)
    values = weight_OI[keep]
    if fixed_count:
        kept = int(counts[0]) if O else 0
        if bool((counts != kept).any()):
            raise ValueError("fixed_count needs the same number of kept weights in every row")
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


def pack_channels(weight: PackedWeight, tile: int) -> ChannelWeight:
    """The channel-major form of a packed weight; see channel_weight.py."""
    from prune_llm_kernels.channel_weight import SLACK, WORD, ChannelWeight

    O, I = weight.out_features, weight.in_features
    dense = unpack(weight.bitmask, weight.packed, weight.offsets, I)
    keep = keep_mask(weight.bitmask, I)
    places = (1 << torch.arange(8)).to(torch.uint8)
    pieces, starts, at = [], [], 0
    for first in range(0, O, tile):
        for i in range(I):
            starts.append(at)
            last = min(O, first + tile)
            for o in range(first, last, WORD):
                kept = keep[o : min(o + WORD, last), i]
                bits = F.pad(kept, (0, WORD - len(kept))).reshape(8, 8).to(torch.uint8)
                mask = (bits * places).sum(1, dtype=torch.uint8).view(dense.dtype)
                values = dense[o : o + len(kept), i][kept]
                # the second half of the words is read from the chunk's end
                pieces += [mask, values] if 2 * (o - first) < last - first else [values, mask]
                at += len(mask) + len(values)
    data = torch.cat([*pieces, dense.new_zeros(SLACK)])
    all_starts = torch.tensor([*starts, at]).to(torch.uint32)
    return ChannelWeight(data, all_starts, O, I, tile, weight.offsets is None)


def unpack_channels(weight: ChannelWeight) -> Tensor:
    """The dense weight [O, I]."""
    from prune_llm_kernels.channel_weight import WORD

    O, I, tile = weight.out_features, weight.in_features, weight.tile
    if weight.starts is None:
        return weight.data[:, :O].T.contiguous()
    dense = weight.data.new_zeros(weight.tiles * tile, I)
    for o, kept_IW, first_I in _channel_words(weight):
        ranks_IW = kept_IW.cumsum(1)
        values_IW = weight.data[(first_I[:, None] + ranks_IW - 1).clamp(min=0)]
        dense[o : o + WORD] = torch.where(kept_IW, values_IW, 0).T
    return dense[:O].contiguous()


def channel_keep_mask(weight: ChannelWeight) -> Tensor:
    """Which weights a packed ChannelWeight holds, bool [O, I]."""
    from prune_llm_kernels.channel_weight import WORD

    O, I, tile = weight.out_features, weight.in_features, weight.tile
    keep = torch.zeros(weight.tiles * tile, I, dtype=torch.bool)
    for o, kept_IW, _ in _channel_words(weight):
        keep[o : o + WORD] = kept_IW.T
    return keep[:O].contiguous()


def _channel_words(weight: ChannelWeight) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each word: its first output, its masks [I, WORD], where its values begin [I]."""
    from prune_llm_kernels.channel_weight import WORD

    assert weight.starts is not None
    I, tile, size = weight.in_features, weight.tile, 8 // weight.data.element_size()
    starts = weight.starts.to(torch.int64)
    for t in range(weight.tiles):
        words = range(t * tile, min((t + 1) * tile, weight.out_features), WORD)
        fronts = (len(words) + 1) // 2
        at_I = starts[t * I : (t + 1) * I]
        for o in words[:fronts]:
            kept_IW = _word_masks(weight.data, at_I)
            yield o, kept_IW, at_I + size
            at_I = at_I + size + kept_IW.sum(1)
        end_I = starts[t * I + 1 : (t + 1) * I + 1]
        for o in reversed(words[fronts:]):
            kept_IW = _word_masks(weight.data, end_I - size)
            end_I = end_I - size - kept_IW.sum(1)
            yield o, kept_IW, end_I


def _word_masks(data: Tensor, at_I: Tensor) -> Tensor:
    """The mask words that lie at the elements at_I, bool [I, WORD]."""
    size = data.element_size()
    bytes_I8 = data.view(torch.uint8)[(at_I * size)[:, None] + torch.arange(8)]
    return keep_mask(bytes_I8, 64)


def channel_linear(x: Tensor, weight: ChannelWeight, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias; x [..., I] -> y [..., O]."""
    return F.linear(x, unpack_channels(weight), bias)


def counting(x_BI: Tensor, thresholds_B: Tensor, scales_I: Tensor | None) -> Tensor:
    """Which inputs count, bool [B, I]: |x| * scale > threshold in float32; NaN always does.

    A negative threshold counts every input; infinity none, the row is left out.
    """
    scores_BI = x_BI.float().abs()
    if scales_I is not None:
        scores_BI = scores_BI * scales_I
    live_B = thresholds_B < torch.inf
    result: Tensor = ~(scores_BI <= thresholds_B[:, None]) & live_B[:, None]
    return result


def new_plan(dtype: torch.dtype) -> Plan:
    """An empty plan; see plan.py."""
    from prune_llm_kernels.reference_plan import ReferencePlan

    return ReferencePlan(dtype)
