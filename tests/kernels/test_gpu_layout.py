"""The GPU's channel-major segments: made with plain torch, taken apart exactly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prune_llm_kernels import ChannelWeight, PackedWeight, gpu_layout, reference
from prune_llm_kernels.gpu_layout import UNIT, pack_channels, unpack_channels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (256, 3), (130, 77), (513, 40), (1030, 17)]
MakeWeight = Callable[[int, int, float, torch.dtype], Tensor]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", gpu_layout.BLOCKS)
def test_packing_and_unpacking_are_exact_inverses(
    make_weight: MakeWeight, dtype: torch.dtype, shape: tuple[int, int], block: int
) -> None:
    for density in (0.0, 0.1, 0.5, 1.0):
        packed = reference.pack(make_weight(*shape, density, dtype))
        dense = reference.unpack(packed.bitmask, packed.packed, packed.offsets, shape[1])
        found = pack_channels(packed, block)
        assert torch.equal(bits(unpack_channels(found)), bits(dense))
        assert torch.equal(gpu_layout.channel_keep_mask(found), dense != 0)


def decoded(weight: ChannelWeight) -> Tensor:
    """The dense weight, read byte by byte as the page describes a segment."""
    assert weight.starts is not None
    O, I, block = weight.out_features, weight.in_features, weight.tile
    raw, dense = weight.data.view(torch.uint8).numpy().tobytes(), torch.zeros(O, I)
    size = weight.data.element_size()
    for segment, unit in enumerate(weight.starts[:-1].tolist()):
        b, i = divmod(segment, I)
        at = unit * UNIT
        mask = int.from_bytes(raw[at : at + block // 8], "little")
        at += block // 8
        for o in range(block):
            if mask >> o & 1:
                dense[b * block + o, i] = weight.data[at // size].float()
                at += size
        assert at <= int(weight.starts[segment + 1]) * UNIT < at + UNIT
        assert not any(raw[at : int(weight.starts[segment + 1]) * UNIT])
    return dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_is_what_the_page_says(make_weight: MakeWeight, dtype: torch.dtype) -> None:
    weight = make_weight(300, 9, 0.4, dtype)
    assert torch.equal(decoded(pack_channels(reference.pack(weight), 256)), weight.float())


def test_masks_that_look_like_nan_survive() -> None:
    """Every mask bit set: as a 16-bit number each half is a NaN."""
    weight = torch.ones(512, 64).bfloat16()
    words = pack_channels(reference.pack(weight)).data.view(torch.int32)[:16]
    assert torch.equal(words, torch.full((16,), -1, dtype=torch.int32))


def test_fixed_counts_come_back_as_they_were_stored(make_weight: MakeWeight) -> None:
    """2:4, with a weight that is kept and zero."""
    keep = torch.zeros(70, 24, dtype=torch.bool)
    keep[:, 1::2] = True
    weight = torch.where(keep, make_weight(70, 24, 1.0, torch.float16), 0)
    weight[5, 3] = 0
    packed = reference.pack_kept(weight, keep, fixed_count=True)
    found = pack_channels(packed, 256)
    again = reference.pack_kept(
        unpack_channels(found), gpu_layout.channel_keep_mask(found), found.fixed_count
    )
    assert again.offsets is None
    assert torch.equal(again.bitmask, packed.bitmask)
    assert torch.equal(again.packed, packed.packed)


def test_bits_of_a_weight(make_weight: MakeWeight) -> None:
    """Half kept: 8 bits of values, 1 of mask, and little for padding and starts."""
    for block, most in ((256, 9.40), (512, 9.22), (1024, 9.13)):
        weight = reference.pack(make_weight(1024, 64, 0.5, torch.bfloat16))
        assert 9 < pack_channels(weight, block).nbytes * 8 / (1024 * 64) < most


def test_stacked_rows_are_the_rows_of_both(make_weight: MakeWeight) -> None:
    one, two = (make_weight(O, 33, 0.5, torch.bfloat16) for O in (5, 12))
    found = gpu_layout.stack_rows([reference.pack(one), reference.pack(two)])
    dense = reference.unpack(found.bitmask, found.packed, found.offsets, 33)
    assert torch.equal(dense, torch.cat([one, two]))
    fixed = [reference.pack(torch.ones(n, 33), fixed_count=True) for n in (2, 3)]
    assert gpu_layout.stack_rows(fixed).packed.shape == (5, 33)


@pytest.mark.parametrize("other", [(3, 34, torch.float32), (3, 33, torch.float16)], ids=str)
def test_weights_that_cannot_be_stacked(other: tuple[int, int, torch.dtype]) -> None:
    O, I, dtype = other
    pair = [reference.pack(torch.ones(3, 33)), reference.pack(torch.ones(O, I, dtype=dtype))]
    with pytest.raises(ValueError, match="differ in their inputs, dtype or kind of pattern"):
        gpu_layout.stack_rows(pair)


def test_a_block_that_no_kernel_has() -> None:
    packed: PackedWeight = reference.pack(torch.ones(3, 3))
    with pytest.raises(ValueError, match="tile 128: on a GPU it must be one of 256, 512, 1024"):
        pack_channels(packed, 128)
