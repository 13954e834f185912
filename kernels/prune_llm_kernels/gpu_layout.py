"""The runtime layout of the GPU kernels: channel-major segments, made on the device.

The outputs are cut into blocks. What an input channel contributes to a block is one segment: first
the mask, an int32 for every 32 outputs (bit j of word w is output 32 w + j of the block), then the
kept values in the order of the outputs, then zeros to a multiple of 16 bytes. Segments lie block by
block, in a block channel by channel: a skipped channel is a skipped run of bytes, and with nothing
skipped a block is one stream. At density 0.5 in bfloat16 a weight takes 9.2 bits: 8 of values, 1 of
mask, 0.11 of padding, 0.06 of starts.

It is held in a ChannelWeight, whose `starts` are int32 here and count units of 16 bytes. Everything
is plain torch: it runs on the device that holds the weight, a block at a time.

Shape letters: O = output features, I = input features, N = outputs of a block, W = mask words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.packed_weight import PackedWeight
from prune_llm_kernels.reference import keep_mask, unpack

UNIT = 16  # bytes; what a bulk copy moves, and what a start counts
WORD = 32  # outputs of a mask word
BLOCKS = (256, 512, 1024)  # outputs a block may have
BLOCK = 512
MULTIPLE = 128  # outputs that are finished by one program, of one weight only


def pack_channels(weight: PackedWeight, block: int = BLOCK) -> ChannelWeight:
    """The channel-major form of a packed weight.

    Raises:
        ValueError: a block of a size that no kernel has, or more than 2**31 units.
    """
    if block not in BLOCKS:
        raise ValueError(f"tile {block}: on a GPU it must be one of {', '.join(map(str, BLOCKS))}")
    O, I, dtype = weight.out_features, weight.in_features, weight.dtype
    lengths = torch.cat([_lengths(keep_IN, dtype.itemsize) for keep_IN in _keeps(weight, block)])
    starts = F.pad(lengths.cumsum(0), (1, 0))
    units = int(starts[-1])
    if units >= 2**31:
        raise ValueError(f"{weight.name}: takes {units * UNIT} bytes; a GPU weight has under 2**35")
    per_unit = UNIT // dtype.itemsize
    # one unit more: where the weights that are not kept are written, and what gathers may touch
    data = torch.zeros((units + 1) * per_unit, dtype=dtype, device=weight.packed.device)
    blocks = zip(_keeps(weight, block), _values(weight, block), strict=True)
    for b, (keep_IN, values_IN) in enumerate(blocks):
        _fill(data, starts[b * I : (b + 1) * I] * per_unit, keep_IN, values_IN)
    return ChannelWeight(data, starts.to(torch.int32), O, I, block, weight.offsets is None)


def _lengths(keep_IN: Tensor, itemsize: int) -> Tensor:
    """Units of each channel's segment, int64 [I]."""
    bytes_I: Tensor = keep_IN.shape[1] // 8 + keep_IN.sum(1) * itemsize
    return (bytes_I + UNIT - 1) // UNIT


def _fill(data: Tensor, at_I: Tensor, keep_IN: Tensor, values_IN: Tensor) -> None:
    """Write a block's segments, the first element of each at ``at_I``."""
    words_IW = pack_words(keep_IN)
    per_word = words_IW.element_size() // data.element_size() or 1
    places_IW = at_I[:, None] * data.element_size() // 4 + _range(words_IW.shape[1], data)
    data.view(torch.int32)[places_IW] = words_IW
    first_I1 = (at_I + words_IW.shape[1] * per_word)[:, None]
    ranks_IN = keep_IN.cumsum(1, dtype=torch.int32)
    # every position is written, without asking the host for their number: the others to one place
    # behind the end, where zeros fall on zeros
    places_IN = torch.where(keep_IN, first_I1 + ranks_IN - 1, data.numel() - 1)
    # as integers: on the CPU a scatter of bfloat16 rewrites masks that look like a NaN
    bits = torch.int16 if data.element_size() == 2 else torch.int32
    data.view(bits).scatter_(0, places_IN.flatten(), values_IN.view(bits).flatten())


def pack_words(keep_IN: Tensor) -> Tensor:
    """bool [I, N] -> int32 [I, N / 32]."""
    bits_IWw = keep_IN.unflatten(1, (-1, WORD)).to(torch.int32)
    # the sum of distinct powers of two; int32 wraps to the sign bit for the last
    words_IW: Tensor = (bits_IWw << _range(WORD, keep_IN)).sum(-1, dtype=torch.int32)
    return words_IW


def unpack_words(words_IW: Tensor) -> Tensor:
    """int32 [I, W] -> bool [I, 32 W]."""
    bits_IWw = (words_IW[..., None] >> _range(WORD, words_IW)) & 1
    return bits_IWw.flatten(1).bool()


def _range(end: int, like: Tensor) -> Tensor:
    return torch.arange(end, dtype=torch.int32, device=like.device)


def _keeps(weight: PackedWeight, block: int) -> Iterator[Tensor]:
    """Which weights of each block are kept, bool [I, N]; none behind the last output."""
    for first in range(0, weight.out_features, block):
        keep_NI = keep_mask(weight.bitmask[first : first + block], weight.in_features)
        yield F.pad(keep_NI, (0, 0, 0, block - len(keep_NI))).T.contiguous()


def _values(weight: PackedWeight, block: int) -> Iterator[Tensor]:
    """The dense weights of each block, [I, N]."""
    O, I, offsets = weight.out_features, weight.in_features, weight.offsets
    firsts = range(0, O, block)
    edges = torch.tensor([*firsts, O], device=weight.packed.device)
    # read once: a slice of packed values needs its ends on the host
    cuts = edges * weight.packed.shape[-1] if offsets is None else offsets[edges]
    ends = cuts.tolist()
    flat = weight.packed.reshape(-1)
    for b, first in enumerate(firsts):
        rows = weight.bitmask[first : first + block]
        dense_NI = unpack(rows, flat[ends[b] : ends[b + 1]], None, I)
        yield F.pad(dense_NI, (0, 0, 0, block - len(dense_NI))).T.contiguous()


def _segments(weight: ChannelWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each block the kept weights, bool [I, N], and where channels' values start, [I]."""
    assert weight.starts is not None
    I, words = weight.in_features, weight.tile // WORD
    starts = weight.starts[:-1].to(torch.int64).reshape(weight.tiles, I)
    masks = weight.data.view(torch.int32)
    for units_I in starts:
        keep_IN = unpack_words(masks[(units_I * (UNIT // 4))[:, None] + _range(words, masks)])
        yield keep_IN, (units_I * UNIT + words * 4) // weight.data.element_size()


def unpack_channels(weight: ChannelWeight) -> Tensor:
    """The dense weight [O, I], bit for bit what was packed."""
    O, I = weight.out_features, weight.in_features
    if weight.starts is None:
        return weight.data[:, :O].T.contiguous()
    dense_OI = weight.data.new_empty(O, I)
    for b, (keep_IN, first_I) in enumerate(_segments(weight)):
        places_IN = first_I[:, None] + keep_IN.cumsum(1) - 1
        values_IN = torch.where(keep_IN, weight.data[places_IN.clamp(min=0)], 0)
        rows = slice(b * weight.tile, min((b + 1) * weight.tile, O))
        dense_OI[rows] = values_IN.T[: rows.stop - rows.start]
    return dense_OI


def channel_keep_mask(weight: ChannelWeight) -> Tensor:
    """Which weights a packed ChannelWeight holds, bool [O, I]."""
    blocks = [keep_IN.T for keep_IN, _ in _segments(weight)]
    return torch.cat(blocks)[: weight.out_features].contiguous()


def stack_rows(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights that share an input as one, their outputs behind each other.

    Raises:
        ValueError: of different inputs or dtypes, or N:M beside unstructured.
    """
    first = weights[0]
    kinds = {(w.in_features, w.dtype, w.offsets is None) for w in weights}
    if len(kinds) > 1:
        raise ValueError("weights to be stacked differ in their inputs, dtype or kind of pattern")
    bitmask = torch.cat([w.bitmask for w in weights])
    packed = torch.cat([w.packed for w in weights])
    if first.offsets is None:
        return PackedWeight(bitmask, packed, None, first.in_features, first.name)
    counts = torch.cat([w.offsets.diff() for w in weights if w.offsets is not None])
    offsets = F.pad(counts.to(torch.int64).cumsum(0), (1, 0))
    return PackedWeight(bitmask, packed, offsets, first.in_features, first.name)


def lay_together(weights: Sequence[ChannelWeight]) -> tuple[ChannelWeight, ...]:
    """The same weights behind each other in one memory, so that one launch can multiply them all.

    What `joined` recognises. Weights that cannot lie together come back as they are: of different
    inputs, blocks or forms, or with outputs that do not fill their blocks, the last excepted.
    """
    first = weights[0]
    kinds = {(w.in_features, w.dtype, w.tile, w.starts is None) for w in weights}
    step = first.tile if first.starts is not None else MULTIPLE
    if len(kinds) > 1 or any(w.out_features % step for w in weights[:-1]):
        return tuple(weights)
    if first.starts is None:
        wide = torch.cat([w.data[:, : w.out_features] for w in weights], 1)
        parts = wide.split([w.out_features for w in weights], 1)
        return tuple(replace(w, data=part) for w, part in zip(weights, parts, strict=True))
    unit = UNIT // first.data.element_size()
    starts = [w.starts for w in weights if w.starts is not None]
    # one wait for the device: the segments of each, without the unit that packing leaves behind
    ends = torch.stack([s[[0, -1]] for s in starts]).tolist()
    data = torch.cat([
        *(w.data[a * unit : b * unit] for w, (a, b) in zip(weights, ends, strict=True)),
        first.data.new_zeros(unit),
    ])  # fmt: skip
    if data.numel() // unit >= 2**31:
        return tuple(weights)
    shift, moved = 0, []
    for s, (a, b) in zip(starts, ends, strict=True):
        moved.append(s[:-1] - a + shift)
        shift += b - a
    together = torch.cat([*moved, starts[0].new_tensor([shift])])
    found, at = [], 0
    for w in weights:
        count = w.tiles * w.in_features
        found.append(replace(w, data=data, starts=together[at : at + count + 1]))
        at += count
    return tuple(found)


def joined(weights: Sequence[ChannelWeight]) -> ChannelWeight | None:
    """Weights that lie behind each other as one [sum of O, I]; None where they do not."""
    first, O = weights[0], sum(w.out_features for w in weights)
    if len(weights) == 1:
        return first
    for one, other in pairwise(weights):
        if not _adjacent(one, other):
            return None
    whole = replace(first, out_features=O)
    if first.starts is None:
        shape = first.in_features, O
        data = first.data.as_strided(shape, (first.data.stride(0), 1), first.data.storage_offset())
        return replace(whole, data=data)
    count = sum(w.tiles for w in weights) * first.in_features + 1
    starts = first.starts.as_strided((count,), (1,), first.starts.storage_offset())
    return replace(whole, starts=starts)


def _adjacent(one: ChannelWeight, other: ChannelWeight) -> bool:
    """Whether the outputs of one go on where those of the other end."""
    if one.in_features != other.in_features or one.tile != other.tile or one.dtype != other.dtype:
        return False
    if one.starts is None or other.starts is None:
        end = one.data.data_ptr() + one.out_features * one.data.element_size()
        return (
            one.starts is other.starts
            and not one.out_features % MULTIPLE
            and one.data.stride(0) == other.data.stride(0)
            and one.data.untyped_storage().data_ptr() == other.data.untyped_storage().data_ptr()
            and end == other.data.data_ptr()
        )
    end = one.starts.data_ptr() + one.tiles * one.in_features * one.starts.element_size()
    return (
        not one.out_features % one.tile
        and one.data.data_ptr() == other.data.data_ptr()
        and end == other.starts.data_ptr()
    )
