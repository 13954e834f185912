"""A weight in input-channel-major order: the runtime layout for inputs of which most are skipped.

The outputs are cut into tiles. What an input channel contributes to a tile lies together: for every
64 outputs 8 bytes of mask and the kept values. Kernels read it from both ends, so the mask comes
first in the first half of the tile and last in the second. A skipped channel is never read. Made
from the stored form at load; it may change with every release and is never written to a file.

Shape letters: O = output features, I = input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_llm_kernels.dispatch import backend_for
from prune_llm_kernels.gpu_ways import Ways
from prune_llm_kernels.packed_weight import PackedWeight

WORD = 64  # outputs of a mask word
MIN_TILE, MAX_TILE = 256, 8192  # outputs whose sums stay in the first cache
PARTS = 4  # threads that can share a tile
SLACK = 64  # elements that wide loads may read behind the last chunk


@dataclass(frozen=True, slots=True)
class ChannelWeight:
    """The weight [O, I], as the CPU's kernels read it; a GPU's segments are in gpu_layout.py.

    Attributes:
        data: packed: one dimension, the chunks behind each other and SLACK zeros; dense: [I, O]
            with zeros to a multiple of WORD behind O.
        starts: uint32 [tiles * I + 1] in elements of data, the chunk of channel i for tile t at
            t * I + i; None for a dense weight.
        tile: outputs of a tile, a multiple of WORD and at most MAX_TILE.
        fixed_count: the stored form has the same number of weights in every row (N:M).
        ways: on a GPU, what was measured to be fastest; None: the kernels of this form.
    """

    data: Tensor
    starts: Tensor | None
    out_features: int
    in_features: int
    tile: int
    fixed_count: bool = False
    ways: Ways | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.starts is None else self.starts.nbytes)

    @property
    def tiles(self) -> int:
        return -(-self.out_features // self.tile)

    def dense(self) -> Tensor:
        """[O, I], bit for bit what was given."""
        return backend_for(self.data.device.type).unpack_channels(self)

    def stored(self) -> PackedWeight | Tensor:
        """As it was given: packed, its kept zeros with it, or dense [O, I]. For saving."""
        from prune_llm_kernels.reference import pack_kept

        dense_OI = self.dense()
        if self.starts is None:
            return dense_OI
        keep_OI = backend_for(self.data.device.type).channel_keep_mask(self)
        return pack_kept(dense_OI, keep_OI, self.fixed_count)


def to_channels(weight: PackedWeight | Tensor, tile: int | None = None) -> ChannelWeight:
    """Put a weight into channel-major order; the given one is not needed any more.

    Args:
        weight: packed, or dense [O, I].
        tile: outputs of a tile; None: what suits the device.

    Raises:
        ValueError: more than 2**32 elements, or a bad tile.
    """
    if isinstance(weight, PackedWeight):
        O, device = weight.out_features, weight.packed.device
    else:
        O, device = weight.shape[0], weight.device
    backend = backend_for(device.type)
    tile = backend.choose_tile(O) if tile is None else tile
    if tile % WORD or not 0 < tile <= MAX_TILE:
        raise ValueError(f"tile {tile}: must be a multiple of {WORD}, at most {MAX_TILE}")
    if isinstance(weight, PackedWeight):
        return backend.pack_channels(weight, tile)
    return _dense_channels(weight, tile)


def _dense_channels(weight_OI: Tensor, tile: int) -> ChannelWeight:
    O, I = weight_OI.shape
    data = weight_OI.new_zeros(I, -(-O // WORD) * WORD)
    data[:, :O] = weight_OI.T
    return ChannelWeight(data, None, O, I, tile)


def choose_tile(out_features: int) -> int:
    """As wide as may be, so that memory is read in long runs; more tiles only for many threads.

    Threads also share a tile, by channels: see csrc/channel_ops.cpp.
    """
    tiles = max(-(-out_features // MAX_TILE), -(-torch.get_num_threads() // PARTS))
    width = max(min(MIN_TILE, out_features), -(-out_features // tiles), 1)
    return -(-width // WORD) * WORD
